"""From token pairs to forward passes, and which of them make a step."""
