"""`impl="triton"` and `"library"`: the only room that imports triton."""
