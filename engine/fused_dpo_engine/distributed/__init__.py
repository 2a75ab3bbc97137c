"""Processes that train one model: who they are, how they hold it, and what becomes of them when one fails."""
