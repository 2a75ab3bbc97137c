"""One file a command, each a function of its settings."""
