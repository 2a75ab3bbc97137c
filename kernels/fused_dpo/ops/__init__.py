"""Operators of `torch.library`, their gradients, and the choice of what runs in them."""
