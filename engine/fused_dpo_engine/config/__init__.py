"""Every setting: what it is, when it is refused, and its form in a file."""
