"""Filtered gradients on CUDA."""
