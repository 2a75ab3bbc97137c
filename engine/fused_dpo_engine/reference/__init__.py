"""Log-probs of the frozen model, computed once."""
