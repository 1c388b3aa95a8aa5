"""Products of sampled rows with matrices, with torch alone: CPU, MPS, and fp64 on any device.

Both are `embedding_bag`s: a weighted sum of table rows for each bag of indices, accumulated in full precision.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hdpo_kernels.sampled.entries import Entries

_UPCAST_COLUMNS = 512  # columns of a low-precision table upcast at a time: 64 MiB for V = 32,000


def gather(entries: Entries, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """d_hidden (n, H) = scale_t · Σ_j values_tj · weight[columns_tj]"""
    _, columns, values = _flat(entries, scale)
    starts = entries.counts.cumsum(0, dtype=torch.int32) - entries.counts
    return _bags(columns, starts, values, weight, dtype)


def gather_transposed(
    entries: Entries,
    hidden: Tensor,  # (n, H)
    scale: Tensor,  # (n,)
    vocab: int,
    dtype: torch.dtype,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """d_weight (V, H) and d_bias (V,), those that are needed: Σ_t scale_t values_tj (h_t and 1) at v = columns_tj."""
    rows, columns, values = _flat(entries, scale)
    columns, order = columns.sort(stable=True)
    rows, values = rows[order], values[order]
    starts = torch.searchsorted(columns, torch.arange(vocab, dtype=torch.int32, device=columns.device), out_int32=True)
    d_weight = _bags(rows, starts, values, hidden, dtype) if need_weight else None
    ones = values.new_ones(1, 1)
    d_bias = _bags(torch.zeros_like(rows), starts, values, ones, dtype).squeeze(1) if need_bias else None
    return d_weight, d_bias


def _flat(entries: Entries, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and scaled value of every entry, row by row."""
    columns, values, counts = entries
    kept = torch.arange(columns.shape[1], device=counts.device) < counts.unsqueeze(1)
    rows = torch.arange(len(counts), dtype=torch.int32, device=counts.device).repeat_interleave(counts)
    return rows, columns[kept], values[kept] * scale[rows]


def _bags(indices: Tensor, starts: Tensor, values: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """(bags, columns of table): Σ values · table[indices] over each bag, rounded once to dtype."""
    if table.dtype == values.dtype:
        return F.embedding_bag(indices, table, starts, mode="sum", per_sample_weights=values).to(dtype)
    out = table.new_empty(len(starts), table.shape[1], dtype=dtype)
    for part, result in zip(table.split(_UPCAST_COLUMNS, 1), out.split(_UPCAST_COLUMNS, 1), strict=True):
        result.copy_(F.embedding_bag(indices, part.to(values.dtype), starts, mode="sum", per_sample_weights=values))
    return out
