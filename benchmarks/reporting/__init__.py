"""Results files to tables and plots."""
