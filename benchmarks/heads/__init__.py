"""One head on one case."""
