"""The variable-length attention kernels of other packages in plain torch, behind the signatures these have.

They check what the kernels check, and compute what the kernels are documented to compute, so that a wrong offset,
window or alignment in the calling code gives a wrong result here as it would there.
"""

from typing import Any

import torch
from torch import Tensor


def varlen_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    causal: bool,
    left: int | None = None,
    softcap: float = 0.0,
    top_left: bool = False,
) -> Tensor:
    """Attention of every segment; `top_left` is what kernels did before flash-attn 2.1, for controls."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert q.dtype == k.dtype == v.dtype
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(q), len(k))
    assert (int(cu_q.diff().max()), int(cu_k.diff().max())) == (max_q, max_k)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    pieces = []
    edges_q, edges_k = cu_q.tolist(), cu_k.tolist()
    for n in range(len(edges_q) - 1):
        rows, keys = slice(*edges_q[n : n + 2]), slice(*edges_k[n : n + 2])
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        length, width = scores.shape[1:]
        last = torch.arange(length) + (0 if top_left else width - length)
        distance = last[:, None] - torch.arange(width)
        hidden = (distance < 0) & causal
        if left is not None and left >= 0:
            hidden |= distance > left
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, v[keys]))
    return torch.cat(pieces)


def flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
) -> Tensor:
    """`flash_attn.flash_attn_varlen_func` of flash-attn 2.6 to 2.8."""
    assert (dropout_p, alibi_slopes, return_attn_probs, block_table) == (0.0, None, False, None)
    offsets = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return varlen_reference(
        q, k, v, *offsets, scale=softmax_scale, causal=causal, left=window_size[0], softcap=softcap
    )  # fmt: skip


def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
) -> Tensor:
    """`flash_attn_interface.flash_attn_varlen_func` of flash-attn 3."""
    assert (seqused_q, seqused_k, qv, attention_chunk, num_splits, sm_margin) == (None, None, None, 0, 1, 0)
    offsets = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return varlen_reference(
        q, k, v, *offsets, scale=softmax_scale, causal=causal, left=window_size[0], softcap=softcap
    )  # fmt: skip


def flash_attn_4(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    return_lse=False,
) -> tuple[Tensor, None]:
    """`flash_attn.cute.flash_attn_varlen_func` of flash-attn 4."""
    assert (seqused_q, seqused_k, page_table, learnable_sink, num_splits) == (None, None, None, None, 1)
    assert cu_seqlens_q is not None
    assert cu_seqlens_k is not None
    assert max_seqlen_q is not None
    assert max_seqlen_k is not None
    offsets = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out = varlen_reference(
        q, k, v, *offsets, scale=softmax_scale, causal=causal, left=window_size[0], softcap=softcap
    )  # fmt: skip
    return out, None


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` of torch 2.13: causal is a window of 0 to the right."""
    assert (return_aux, seqused_k, block_table, num_splits) == (None, None, None, None)
    assert window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    offsets = (cu_seq_q, cu_seq_k, max_q, max_k)
    return varlen_reference(query, key, value, *offsets, scale=scale, causal=True, left=window_size[0])


def varlen_attn_without_groups(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
) -> Tensor:
    """The same of a release whose heads have to be as many in keys as in queries."""
    return varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
    )  # fmt: skip


def varlen_attn_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux: Any = None
) -> Tensor:
    """`varlen_attn` of torch 2.10: no scale, no window, no groups."""
    assert query.shape[1] == key.shape[1]
    return varlen_reference(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=None, causal=is_causal
    )  # fmt: skip
