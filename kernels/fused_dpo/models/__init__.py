"""Hugging Face models, read: the head, the backbone, and whether they are what the model does."""
