"""`impl="streaming"`: vocabulary slices in plain torch, on any device."""
