"""`impl="triton"` and `"library"`: the only room that imports triton.

Words of this room:
    tile: logits of some rows and some columns, in the registers of one program.
    split: columns of the vocabulary that one program of the forward walks, SPLIT_COLUMNS of them.
    slice: columns whose dz, or whose converted weight, is in memory at a time.
    block: the rows of one tile; with a screen, those that share their kept columns.
    group: row blocks whose hidden states fit into the L2 cache together, and which take the columns side by side.
    hot: the first splits, which the filtered forward runs once before the others. Byte-pair vocabularies begin with
        their most frequent tokens, so what these sum to bounds the sum over the whole vocabulary well.
    narrow: columns that share the list of rows kept for the weight's gradient, NARROW_COLUMNS of them.
    described: loaded by tensor descriptors instead of pointers.
    flattened: with the loop over tiles and that over the hidden dimension as one, so that loads run on between tiles.
    given: of a tile whose product of hidden states and weight is read, not formed, as a library has multiplied.
    marks: flags of the rows that have something above the threshold in a narrow block of columns.
    kept, dropped: above and below the filter's threshold.
    saved: of exponentials that the forward leaves for the backward.
"""
