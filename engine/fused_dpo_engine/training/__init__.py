"""The loop: steps, optimizer, metrics, and the folder of a run."""
