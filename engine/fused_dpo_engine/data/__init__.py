"""From rows of files to token pairs."""
