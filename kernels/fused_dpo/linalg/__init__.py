"""Products with fp32 results, the factors that they take, and the sums that become gradients."""
