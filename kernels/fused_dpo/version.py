"""The version of the distribution, as in pyproject.toml."""

VERSION = "0.1.0"
