"""The logits' product by the library's matmul, a piece at a time, and the Triton kernels that read it.

The rival of kernels that multiply themselves: a library's matmul runs at the rate that the hardware can do, and its
fp32 result, 32 MiB at a time, has to go through the L2 cache once more. Pieces have the same shape whatever the batch
holds, the last rows padded with zeros: the library may choose other kernels for other shapes, and a sequence's log-prob
would then depend on what else is in the batch. So the smallest batch takes the time of `LibraryConfig.chunk_rows` rows.
That equal rows of one product have equal bits wherever they stand is taken for granted; `benchmarks.gpu.checks` looks.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fused_dpo.gpu.backward import DLogits, ScoredRows
from fused_dpo.gpu.configs import library_config
from fused_dpo.gpu.forward import Partials
from fused_dpo.gpu.launch import Product, WeightSlice, architecture, padded, weight_slices
from fused_dpo.gpu.merge import Results
from fused_dpo.head import HeadInputs, LMHead
from fused_dpo.linalg.matmul import matmul_fp32
from fused_dpo.linalg.sizes import ceil_div


def products(h: Tensor, weight: WeightSlice, values: Tensor) -> Iterator[Product]:
    """Multiply `padded` hidden rows with rows of the weight in their dtype, some columns at a time.

    `values` has that many, and each product overwrites the one before: two in turn would not stay in the L2 cache.
    """
    for start in range(0, weight.values.shape[0], values.shape[1]):
        rows = weight.values[start : start + values.shape[1]]
        part = values[:, : rows.shape[0]]
        matmul_fp32(h, rows.T, out=part)
        yield Product(part, weight.first + start)


def library_scan(inputs: HeadInputs, results: Results, filter_eps: float) -> None:
    """Fill the results by given products, as `fused_dpo.gpu.forward.Scan` does; the first slice bounds a screen.

    A slice of the weight is converted, and read from memory, once for as many chunks as fit into the workspace.

    Memory: 4 bytes for each entry of a product; a slice of the weight where it has another dtype; and `workspace_mib`
        for 8 bytes (20 with stats, and 4 more with a screen) a row and split, and for copies of hidden states where
        not all rows are scored.
    """
    hidden, _, rows, head, workspace_mib, _ = inputs
    config = library_config(architecture(hidden.device), hidden.dtype)
    (V, D), R, tile, split = head.weight.shape, rows.numel(), config.tile, config.split_columns
    width, all_scored = min(config.slice_columns, V), hidden.shape[0] == R
    values = torch.empty(width, config.chunk_rows, dtype=torch.float32, device=hidden.device).T
    row_bytes = 4 * ceil_div(V, split) * results.partials
    row_bytes += 0 if all_scored else D * hidden.element_size()
    rows_at_once = max(workspace_mib * 2**20 // (config.chunk_rows * row_bytes), 1) * config.chunk_rows
    for start in range(0, R, rows_at_once):
        chunks: list[tuple[Partials, Tensor]] = []
        for first in range(start, min(start + rows_at_once, R), config.chunk_rows):
            here = slice(first, first + config.chunk_rows)
            of_chunk = results
            if results.screen is not None:
                of_chunk = results._replace(screen=results.screen[first // tile.block_t :])
            partials = Partials(inputs._replace(rows=rows[here]), of_chunk, filter_eps, tile, split)
            chunks.append((partials, padded(hidden[here] if all_scored else hidden[rows[here]], config.chunk_rows)))
        for weight in weight_slices(head.weight, hidden.dtype, width):
            for partials, h in chunks:
                for product in products(h, weight, values):
                    _scan_product(partials, product, split, screening=results.screen is not None)
        for partials, _ in chunks:
            partials.merge()


def _scan_product(partials: Partials, product: Product, split: int, *, screening: bool) -> None:
    first_split, splits = product.first // split, ceil_div(product.values.shape[1], split)
    if screening and first_split == 0:
        if partials.has_hot_splits:
            partials.forward(0, splits, product)
        partials.bound(splits)
    partials.forward(first_split, splits, product)


def library_dlogits(scored_rows: ScoredRows, head: LMHead) -> Callable[[Tensor, WeightSlice], None]:
    """Make what fills dz by given products, as `fused_dpo.gpu.backward.FormDLogits` does.

    Memory: 4 bytes for each entry of a product, and the last chunk's hidden states.
    """
    hidden = scored_rows.hidden
    config = library_config(architecture(hidden.device), hidden.dtype)
    chunks = [slice(first, first + config.chunk_rows) for first in range(0, hidden.shape[0], config.chunk_rows)]
    launches = [DLogits(scored_rows.part(chunk), head, config=config.dz_tile) for chunk in chunks]
    operands = [padded(hidden[c], config.chunk_rows) for c in chunks]
    width = min(config.slice_columns, head.weight.shape[0])
    values = torch.empty(config.chunk_rows, width, dtype=torch.float32, device=hidden.device)

    def fill(dz: Tensor, weight: WeightSlice) -> None:
        for chunk, dlogits, h in zip(chunks, launches, operands, strict=True):
            for product in products(h, weight, values):
                start = product.first - weight.first
                dlogits(dz[chunk, start : start + product.values.shape[1]], product)

    return fill
