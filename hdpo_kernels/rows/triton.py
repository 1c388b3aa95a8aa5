"""Row operations as Triton kernels: one program a row for the statistics, one a tile of a row for the gradient.

n rows, V vocabulary. Logits of any dtype are read as fp32; statistics are fp32. Offsets are int64 before any product
with a stride: n · V passes 2³¹ at 16k tokens and a 128k vocabulary.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdpo_kernels.naive import IGNORE_INDEX
from hdpo_kernels.rows.torch import RowStats
from hdpo_kernels.sampled.entries import Sampling

_IGNORE_INDEX = tl.constexpr(IGNORE_INDEX)
# Tiles by plain constants: memory-bound kernels, 8 fp32 numbers a thread (16 warps). With 16 numbers a thread some
# targets spilled a register under a softcap.
BLOCK_V = 4096
NUM_WARPS = 16
# Running sums need 90 to 120 registers a thread whatever the tile: narrow programs, so that five fit a multiprocessor.
SAMPLE_BLOCK_V = 1024
SAMPLE_NUM_WARPS = 4
BLOCK_N = 1024


@triton.jit
def _head_transform(
    z, bias_ptr, offs_v, mask_v, softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """softcap · tanh(logit_scale · (z + b) / softcap), and its derivative with respect to z."""
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    z *= logit_scale
    chain = logit_scale
    if HAS_SOFTCAP:
        # tanh by exp(-2|x|) ≤ 1: no overflow, and the same on every target
        x = z * (1.0 / softcap)  # a division a program, not one a logit
        e = tl.exp(-2.0 * tl.abs(x))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(x < 0, -t, t)
        z = softcap * t
        chain = logit_scale * (1.0 - t * t)
    return z, chain


@triton.jit
def _row_stats_kernel(
    logits_ptr, logits_stride, labels_ptr, bias_ptr, max_ptr, log_total_ptr, logp_ptr, entropy_ptr, V, softcap,
    logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (m + log Σ), logp and entropy of one row in one read.

    An online softmax with Σ e^(z−m) and Σ e^(z−m)·(z−m).
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * logits_stride

    # One maximum for the row, but sums per lane, reduced once at the end: fewer barriers, and pairwise accuracy.
    m = -float("inf")
    sum_e = tl.zeros([BLOCK_V], tl.float32)
    sum_ed = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        z = tl.load(logits_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        z, _ = _head_transform(z, bias_ptr, offs_v, mask_v, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
        z = tl.where(mask_v, z, -float("inf"))
        m_new = tl.maximum(m, tl.max(z, 0))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)  # while all entries so far are −inf
        shift = tl.where(m == -float("inf"), 0.0, m - base)
        rescale = tl.exp(shift)
        d = z - base
        e = tl.exp(d)
        sum_ed = rescale * (sum_ed + shift * sum_e) + tl.where(e == 0, 0.0, e * d)  # 0 · −inf is 0 here
        sum_e = rescale * sum_e + e
        m = m_new
    total = tl.sum(sum_e, 0)
    log_total = tl.log(total)

    # A label outside the vocabulary must not read beyond the row: its log-probability is NaN, and so is the loss.
    valid = (label >= 0) & (label < V)
    y = tl.where(valid, label, 0)
    z_y = tl.load(logits_ptr + y).to(tl.float32)
    z_y, _ = _head_transform(z_y, bias_ptr, y, valid, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    logp = tl.where(valid, (z_y - m) - log_total, float("nan"))
    ignored = label == _IGNORE_INDEX
    # Not their sum, which would be rounded at the size of the logits: the gradient's probabilities need the digits.
    tl.store(max_ptr + row, m)
    tl.store(log_total_ptr + row, log_total)
    tl.store(logp_ptr + row, tl.where(ignored, 0.0, logp))
    tl.store(entropy_ptr + row, tl.where(ignored, 0.0, log_total - tl.sum(sum_ed, 0) / total))


@triton.jit
def _row_grad_kernel(
    logits_ptr, logits_stride, grad_ptr, grad_stride, labels_ptr, bias_ptr, max_ptr, log_total_ptr, V, softcap,
    logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """∂logp/∂logits = (onehot − p) · chain for one tile of one row; grad_ptr may be logits_ptr."""
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    label = tl.load(labels_ptr + row)
    m = tl.load(max_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    z = tl.load(logits_ptr + row * logits_stride + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    z, chain = _head_transform(z, bias_ptr, offs_v, mask_v, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    grad = (tl.where(offs_v == label, 1.0, 0.0) - tl.exp((z - m) - log_total)) * chain
    grad = tl.where(label == _IGNORE_INDEX, 0.0, grad)
    tl.store(grad_ptr + row * grad_stride + offs_v, grad.to(grad_ptr.dtype.element_ty), mask=mask_v)


@triton.jit
def _row_sample_kernel(
    logits_ptr, logits_stride, labels_ptr, bias_ptr, max_ptr, log_total_ptr, draws_ptr, columns_ptr, values_ptr,
    counts_ptr, V, capacity, epsilon, softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row of ∂logp/∂logits, rounded to entries: the label and p ≥ ε exactly, of the others some as ε.

    A running sum of the others in units of ε starts at the row's random number; where it passes an integer, that entry
    is taken. Of the sum only the fraction is kept, as 32 bits that wrap around: exact whatever the order of additions.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    m = tl.load(max_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    fraction = tl.load(draws_ptr + row).to(tl.uint32)
    count = 0
    logits_ptr += row * logits_stride
    columns_ptr += row * capacity
    values_ptr += row * capacity
    if label != _IGNORE_INDEX:
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            mask_v = offs_v < V
            z = tl.load(logits_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
            z, chain = _head_transform(z, bias_ptr, offs_v, mask_v, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
            p = tl.exp((z - m) - log_total)
            is_label = offs_v == label
            small = (p < epsilon) & (offs_v != label)  # a NaN is not: it is kept
            # the largest fp32 below 1: for an ε that is no power of two, p / ε may round up to it
            step = tl.minimum(p * (1.0 / epsilon), 1.0 - 1.0 / 16777216.0) * 4294967296.0
            step = tl.where(small & mask_v, step, 0.0).to(tl.uint32)
            sums = fraction + tl.cumsum(step, 0)
            taken = ((sums < step) | (small == 0)) & mask_v
            index = count + tl.cumsum(taken.to(tl.int32), 0) - 1
            value = (tl.where(is_label, 1.0, 0.0) - tl.where(small, epsilon, p)) * chain
            store = taken & (index < capacity)  # NaN rows alone are kept whole
            tl.store(columns_ptr + index, offs_v, mask=store)
            tl.store(values_ptr + index, value, mask=store)
            fraction += tl.sum(step, 0).to(tl.uint32)
            count += tl.sum(taken.to(tl.int32), 0)
    tl.store(counts_ptr + row, tl.minimum(count, capacity))


@triton.jit
def _sequence_sum_kernel(values_ptr, cu_seqlens_ptr, sums_ptr, BLOCK_N: tl.constexpr):
    """One program a sequence; sums per lane first, so that 64k tokens do not lose digits."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for first in range(start, end, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        acc += tl.load(values_ptr + offs_n, mask=offs_n < end, other=0.0).to(tl.float32)
    tl.store(sums_ptr + sequence, tl.sum(acc, 0))


def row_stats(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    # Receives ∂logp/∂logits, zero at label -100: (n, V) of any dtype, may be logits; or entries, rounded.
    grad_out: Tensor | Sampling | None = None,
    overwrite: bool = True,  # the logits may be used as scratch
    merge: Callable[[Tensor], Tensor] | None = None,  # logits are a shard of the vocabulary: see parallel.VocabShard
) -> RowStats:
    n, vocab = logits.shape
    top, log_total, logp, entropy = torch.empty(4, n, dtype=torch.float32, device=logits.device)
    if n == 0:
        return RowStats(top, logp, entropy)
    block_v = min(BLOCK_V, triton.next_power_of_2(vocab))
    head = dict(HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, BLOCK_V=block_v, num_warps=NUM_WARPS)
    scalars = (vocab, 1.0 if softcap is None else float(softcap), float(logit_scale))
    bias_or_dummy = logits if bias is None else bias
    _row_stats_kernel[(n,)](
        logits, logits.stride(0), labels, bias_or_dummy, top, log_total, logp, entropy, *scalars, **head
    )
    if merge is not None:
        ignored = labels == IGNORE_INDEX
        top, log_total, logp, entropy = merge(torch.stack([top, log_total, logp, entropy]))
        logp, entropy = logp.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)
    if isinstance(grad_out, Sampling):
        epsilon, draws, entries = grad_out
        narrow = {**head, "BLOCK_V": min(SAMPLE_BLOCK_V, block_v), "num_warps": SAMPLE_NUM_WARPS}
        _row_sample_kernel[(n,)](
            logits, logits.stride(0), labels, bias_or_dummy, top, log_total, draws, *entries, vocab,
            entries.columns.shape[1], epsilon, *scalars[1:], **narrow,
        )  # fmt: skip
    elif grad_out is not None:
        _row_grad_kernel[(n, triton.cdiv(vocab, block_v))](
            logits, logits.stride(0), grad_out, grad_out.stride(0), labels, bias_or_dummy, top, log_total, *scalars,
            **head,
        )  # fmt: skip
    return RowStats(top + log_total, logp, entropy)


def sequence_sum(values: Tensor, cu_seqlens: list[int]) -> Tensor:
    """(N,) -> (S,) fp32."""
    sums = torch.empty(len(cu_seqlens) - 1, dtype=torch.float32, device=values.device)
    if len(sums):
        bounds = torch.tensor(cu_seqlens, dtype=torch.int64, device="cpu").to(values.device, non_blocking=True)
        _sequence_sum_kernel[(len(sums),)](values, bounds, sums, BLOCK_N=BLOCK_N)
    return sums
