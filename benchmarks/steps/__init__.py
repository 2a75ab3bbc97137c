"""One training step, in different ways."""
