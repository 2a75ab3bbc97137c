"""Attention over packed rows: who sees whom, and what computes it. Knows nothing of data."""
