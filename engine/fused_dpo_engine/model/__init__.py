"""A Hugging Face model made ready to train: loaded, checked, patched, wrapped."""
