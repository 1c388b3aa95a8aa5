"""What a call of the loss at the LM head holds beside its inputs and results, for whoever plans memory."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hdpo_kernels.gemm import UPCAST_BLOCK
from hdpo_kernels.lm_head import buffers_for, full_precision, pitch
from hdpo_kernels.logp import compute_dtype
from hdpo_kernels.objectives import NONE, OBJECTIVES, TWO
from hdpo_kernels.pair import kind_of
from hdpo_kernels.rows.torch import BLOCK_BYTES


class Workspace(NamedTuple):
    """Bytes: `kept` by the thread for its next call (on a CPU only), and `passing`, free again after the call."""

    kept: int
    passing: int


def head_workspace_bytes(
    hidden: Tensor,
    weight: Tensor,
    cu_seqlens: Sequence[int],
    *,
    nll_weight: float = 0.0,
    loss_type: str | Sequence[str] = "sigmoid",
    f_divergence_type: str = "reverse_kl",
    gradient: str = "exact",
    chunk_bytes: int | None = None,
    device: torch.device | None = None,
) -> Workspace:
    """Bytes that the forward of `linear_hdpo_loss` holds beside its inputs, the loss, d_hidden and d_weight.

    Args:
        hidden, weight: (N, H) and (V, H), of which shapes, dtypes and requires_grad are read, so that they may be on
            "meta". All N rows are taken to be scored. Under autocast as there.
        cu_seqlens, nll_weight, loss_type, f_divergence_type, gradient, chunk_bytes: as in `linear_hdpo_loss`.
        device: where the call would run; default: where hidden is.
    """
    device, dtype = hidden.device if device is None else device, compute_dtype(hidden)
    wanted, on_cpu = hidden.requires_grad or weight.requires_grad, device.type == "cpu"
    exact = wanted and gradient == "exact"
    (rows, hidden_size), vocab = hidden.shape, weight.shape[0]
    piece_rows, tile_rows, tables = buffers_for(rows, vocab, dtype, exact, chunk_bytes, device)
    buffers = sum(count * pitch(vocab, device) * table.itemsize for count, table in tables)
    casts = sum(t.numel() for t in (hidden, weight) if t.dtype != dtype) * dtype.itemsize  # under autocast
    # one after the other, so that the largest counts: logits, rows, d_weight
    logits, stats, d_weight = 0, 0, 0
    if weight.requires_grad and exact:
        d_weight = min(piece_rows, rows) * hidden_size * dtype.itemsize  # hidden states, scaled
    if on_cpu:
        stats = BLOCK_BYTES  # scratch of row operations
        stats *= 6 if wanted and not exact else 1  # which round rows in 64-bit integers
    if on_cpu and dtype.itemsize < 4:  # operands of GEMMs, upcast
        block = min(UPCAST_BLOCK, vocab)
        logits = (block + min(tile_rows, rows)) * hidden_size * 4
        d_weight += min(piece_rows, rows) * (block + hidden_size) * 4 if d_weight else 0
    passing = casts + max(logits, stats, d_weight)
    long = sum(end - start > piece_rows for start, end in itertools.pairwise(cu_seqlens[::2]))
    if d_weight and long:  # more buffers for d_weight, see `plan_chunks`
        names = [loss_type] if isinstance(loss_type, str) else loss_type
        likelihood = nll_weight > 0 or any(OBJECTIVES[name].of == NONE for name in names)
        more = 1 + (long > 1) if kind_of(names, f_divergence_type) == TWO else int(long > 1 or likelihood)
        passing += more * vocab * hidden_size * full_precision(dtype).itemsize
    return Workspace(buffers, passing) if on_cpu else Workspace(0, buffers + passing)
