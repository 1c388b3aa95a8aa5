"""Row operations as Triton kernels: one program a row for the statistics, one a tile of a row for the gradient; one a
row for both where a row fits a program.

n rows, V vocabulary. Logits of any dtype are read as fp32; statistics are fp32. Offsets are int64 before any product
with a stride: n · V passes 2³¹ at 16k tokens and a 128k vocabulary. Pointers to one number a row may point anywhere
(a tile's first row): a kernel is not compiled once for each alignment of theirs.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdpo_kernels.device import to_device
from hdpo_kernels.naive import IGNORE_INDEX, TokenLogp
from hdpo_kernels.sampled.entries import Sampling

_IGNORE_INDEX = tl.constexpr(IGNORE_INDEX)
# Tiles by plain constants: memory-bound kernels, 8 fp32 numbers a thread. With 16 numbers a thread some targets spilled
# a register under a softcap. 8 warps, so that the programs of 384 rows all run at once on 132 multiprocessors.
BLOCK_V = 2048
NUM_WARPS = 8
# Running sums need up to 128 registers a thread whatever the tile: narrow programs, so that four fit a multiprocessor.
SAMPLE_BLOCK_V = 1024
SAMPLE_NUM_WARPS = 4
# A row of up to so many numbers stays in the registers of one program, 32 a thread of 1,024: read once, not twice. Half
# as many under a bias or a softcap, which take registers too.
WHOLE_ROW = 32768
BLOCK_N = 1024
BLOCK_H = 1024  # columns of a thin matrix that a program scales
TIMES_BLOCK = 2048
_STATS = ["max_ptr", "log_total_ptr", "logp_ptr", "entropy_ptr", "is_top1_ptr"]
_PER_ROW = ["labels_ptr", *_STATS, "draws_ptr", "scale_ptr"]


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
def _is_top1(z_y, m, logp, ignored):
    # z_y and m are compared, not subtracted: a product fused into a subtraction is not rounded as it was in m
    return tl.where((z_y >= m) & (logp == logp) & (ignored == 0), 1.0, 0.0)  # NaN is no likeliest token


@triton.jit
def _load_tile(logits_ptr, start, V, BLOCK_V: tl.constexpr):
    offs_v = start + tl.arange(0, BLOCK_V)
    return tl.load(logits_ptr + offs_v, mask=offs_v < V, other=0.0)


@triton.jit(do_not_specialize_on_alignment=_PER_ROW)
def _row_stats_kernel(
    logits_ptr, logits_stride, labels_ptr, bias_ptr, max_ptr, log_total_ptr, logp_ptr, entropy_ptr, is_top1_ptr, V,
    softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (m + log Σ), logp, entropy and is_top1 of one row in one read.

    An online softmax with Σ e^(z−m) and Σ e^(z−m)·(z−m).
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * logits_stride

    # One maximum for the row, but sums per lane, reduced once at the end: fewer barriers, and pairwise accuracy.
    m = -float("inf")
    sum_e = tl.zeros([BLOCK_V], tl.float32)
    sum_ed = tl.zeros([BLOCK_V], tl.float32)
    ahead = _load_tile(logits_ptr, 0, V, BLOCK_V)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        z = ahead.to(tl.float32)
        ahead = _load_tile(logits_ptr, start + BLOCK_V, V, BLOCK_V)  # under way while this one is worked on
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
    tl.store(is_top1_ptr + row, _is_top1(z_y, m, logp, ignored))


@triton.jit(do_not_specialize_on_alignment=_PER_ROW)
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


@triton.jit(do_not_specialize_on_alignment=_PER_ROW)
def _whole_row_kernel(
    logits_ptr, logits_stride, grad_ptr, grad_stride, labels_ptr, bias_ptr, logp_ptr, entropy_ptr, is_top1_ptr, V,
    softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`_row_stats_kernel` and `_row_grad_kernel` of a row of at most BLOCK_V numbers, which is read once.

    grad_ptr may be logits_ptr: all reads come before the first store, and a reduction over threads between them.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    label = tl.load(labels_ptr + row)
    logits_ptr += row * logits_stride
    valid = (label >= 0) & (label < V)
    y = tl.where(valid, label, 0)
    z_y = tl.load(logits_ptr + y).to(tl.float32)
    z = tl.load(logits_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    z_y, _ = _head_transform(z_y, bias_ptr, y, valid, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    z, _ = _head_transform(z, bias_ptr, offs_v, mask_v, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
    z = tl.where(mask_v, z, -float("inf"))
    m = tl.max(z, 0)
    d = z - tl.where(m == -float("inf"), 0.0, m)
    e = tl.exp(d)
    total = tl.sum(e, 0)
    log_total = tl.log(total)
    entropy = log_total - tl.sum(tl.where(e == 0, 0.0, e * d), 0) / total  # 0 · −inf is 0 here
    logp = tl.where(valid, (z_y - m) - log_total, float("nan"))

    ignored = label == _IGNORE_INDEX
    tl.store(logp_ptr + row, tl.where(ignored, 0.0, logp))
    tl.store(entropy_ptr + row, tl.where(ignored, 0.0, entropy))
    tl.store(is_top1_ptr + row, _is_top1(z_y, m, logp, ignored))
    grad = tl.where(offs_v == label, 1.0, 0.0) - tl.exp((z - m) - log_total)
    if HAS_SOFTCAP:
        t = z * (1.0 / softcap)
        grad *= 1.0 - t * t
    grad = tl.where(ignored, 0.0, grad * logit_scale)
    tl.store(grad_ptr + row * grad_stride + offs_v, grad.to(grad_ptr.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize_on_alignment=_PER_ROW)
def _row_sample_kernel(
    logits_ptr, logits_stride, labels_ptr, bias_ptr, max_ptr, log_total_ptr, draws_ptr, columns_ptr, values_ptr,
    counts_ptr, V, capacity, epsilon, softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row of ∂logp/∂logits, rounded to entries: the label and p ≥ ε exactly, of the others some as ε.

    A running sum of the others in units of ε starts at the row's random number; where it passes an integer, that entry
    is taken. The sum is in fixed point, 32 bits below the point: exact whatever the order of additions. An entry kept
    exactly adds 1, so that the integer above the point counts the entries taken: one scan gives both.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    m = tl.load(max_ptr + row)
    log_total = tl.load(log_total_ptr + row)
    position = tl.load(draws_ptr + row)
    logits_ptr += row * logits_stride
    columns_ptr += row * capacity
    values_ptr += row * capacity
    if label != _IGNORE_INDEX:
        ahead = _load_tile(logits_ptr, 0, V, BLOCK_V)
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            mask_v = offs_v < V
            z = ahead.to(tl.float32)
            ahead = _load_tile(logits_ptr, start + BLOCK_V, V, BLOCK_V)
            z, chain = _head_transform(z, bias_ptr, offs_v, mask_v, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
            p = tl.exp((z - m) - log_total)
            is_label = offs_v == label
            small = (p < epsilon) & (offs_v != label)  # a NaN is not: it is kept
            # the largest fp32 below 1: for an ε that is no power of two, p / ε may round up to it
            step = tl.minimum(p * (1.0 / epsilon), 1.0 - 1.0 / 16777216.0) * 4294967296.0
            step = tl.where(small, step, 0.0).to(tl.uint32).to(tl.int64)
            step = tl.where(mask_v, tl.where(small, step, 4294967296), 0)
            sums = position + tl.cumsum(step, 0)
            taken = (sums >> 32) > ((sums - step) >> 32)
            index = (sums >> 32).to(tl.int32) - 1
            value = (tl.where(is_label, 1.0, 0.0) - tl.where(small, epsilon, p)) * chain
            store = taken & (index < capacity)  # NaN rows alone are kept whole
            tl.store(columns_ptr + index, offs_v, mask=store)
            tl.store(values_ptr + index, value, mask=store)
            position += tl.sum(step, 0)
    tl.store(counts_ptr + row, tl.minimum((position >> 32).to(tl.int32), capacity))


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["values_ptr", "cu_seqlens_ptr"])
def _sequence_sum_kernel(values_ptr, N, cu_seqlens_ptr, sums_ptr, BLOCK_N: tl.constexpr):
    """One program a sequence of a row of values; sums per lane first, so that 64k tokens do not lose digits."""
    sequence, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for first in range(start, end, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        acc += tl.load(values_ptr + row * N + offs_n, mask=offs_n < end, other=0.0).to(tl.float32)
    tl.store(sums_ptr + row * tl.num_programs(0) + sequence, tl.sum(acc, 0))


@triton.jit(do_not_specialize_on_alignment=["values_ptr", "cu_seqlens_ptr"])
def _sequence_spread_kernel(values_ptr, cu_seqlens_ptr, out_ptr, BLOCK_N: tl.constexpr):
    """One program a sequence, whose value each of its rows gets."""
    sequence = tl.program_id(0)
    value = tl.load(values_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    for first in range(tl.load(cu_seqlens_ptr + sequence), end, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        tl.store(out_ptr + offs_n, tl.zeros([BLOCK_N], out_ptr.dtype.element_ty) + value, mask=offs_n < end)


@triton.jit(do_not_specialize_on_alignment=_PER_ROW)
def _scale_rows_kernel(
    hidden_ptr, hidden_stride, out_ptr, out_stride, labels_ptr, scale_ptr, scale_stride, factor, factor_ptr, H,
    HAS_LABELS: tl.constexpr, HAS_FACTOR: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile of one row times its scale; out_ptr may be hidden_ptr."""
    row = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    scale = tl.load(scale_ptr + row * scale_stride).to(tl.float32) * factor
    if HAS_FACTOR:
        scale *= tl.load(factor_ptr).to(tl.float32)
    scaled = tl.load(hidden_ptr + row * hidden_stride + offs_h, mask=mask_h, other=0.0).to(tl.float32) * scale
    if HAS_LABELS:
        scaled = tl.where(tl.load(labels_ptr + row) == _IGNORE_INDEX, 0.0, scaled)  # whatever it holds: 0 · NaN is NaN
    tl.store(out_ptr + row * out_stride + offs_h, scaled.to(out_ptr.dtype.element_ty), mask=mask_h)


@triton.jit(do_not_specialize=["total"])
def _times_kernel(acc_ptr, factor_ptr, out_ptr, total, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """In place it is done at once where the factor is 1, as the gradient of a loss mostly is."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if (factor != 1.0) | (not IN_PLACE):
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        acc = tl.load(acc_ptr + offs, mask=offs < total, other=0.0)
        tl.store(out_ptr + offs, (acc * factor).to(out_ptr.dtype.element_ty), mask=offs < total)


def row_stats(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n,) int64
    *,
    out: TokenLogp | None = None,  # where the statistics go
    all_scored: bool = False,  # of interest to torch's operations alone
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    # Receives ∂logp/∂logits, zero at label -100: (n, V) of any dtype, may be logits; or entries, rounded.
    grad_out: Tensor | Sampling | None = None,
    overwrite: bool = True,  # the logits may be used as scratch
    merge: Callable[[Tensor], Tensor] | None = None,  # logits are a shard of the vocabulary: see parallel.VocabShard
) -> TokenLogp:
    n, vocab = logits.shape
    out = TokenLogp(*torch.empty(3, n, dtype=torch.float32, device=logits.device)) if out is None else out
    if n == 0:
        return out
    flags = dict(HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None)
    scalars = (vocab, 1.0 if softcap is None else float(softcap), float(logit_scale))
    rows = (logits, logits.stride(0))
    bias_or_dummy = logits if bias is None else bias
    if isinstance(grad_out, Tensor) and merge is None and vocab <= longest_whole_row(**flags):
        whole = whole_row_tile(vocab, 64 if torch.version.hip else 32)
        _whole_row_kernel[(n,)](
            *rows, grad_out, grad_out.stride(0), labels, bias_or_dummy, *out, *scalars, **flags, **whole
        )
        return out

    block_v = min(BLOCK_V, triton.next_power_of_2(vocab))
    head = dict(**flags, BLOCK_V=block_v, num_warps=NUM_WARPS)
    top, log_total = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    _row_stats_kernel[(n,)](*rows, labels, bias_or_dummy, top, log_total, *out, *scalars, **head)
    if merge is not None:
        ignored = labels == IGNORE_INDEX
        top, log_total, *merged = merge(torch.stack([top, log_total, *out]))
        for mine, of_all in zip(out, merged, strict=True):
            mine.copy_(of_all.masked_fill(ignored, 0))
    if isinstance(grad_out, Sampling):
        epsilon, draws, entries = grad_out
        narrow = {**head, "BLOCK_V": min(SAMPLE_BLOCK_V, block_v), "num_warps": SAMPLE_NUM_WARPS}
        _row_sample_kernel[(n,)](
            *rows, labels, bias_or_dummy, top, log_total, draws, *entries, vocab, entries.columns.shape[1], epsilon,
            *scalars[1:], **narrow,
        )  # fmt: skip
    elif grad_out is not None:
        _row_grad_kernel[(n, triton.cdiv(vocab, block_v))](
            *rows, grad_out, grad_out.stride(0), labels, bias_or_dummy, top, log_total, *scalars, **head
        )
    return out


def longest_whole_row(HAS_BIAS: bool, HAS_SOFTCAP: bool) -> int:
    return WHOLE_ROW // 2 if HAS_BIAS or HAS_SOFTCAP else WHOLE_ROW


def whole_row_tile(vocab: int, warp_size: int) -> dict[str, int]:
    """A row at once, 8 numbers a thread while there are threads, 1,024 of them at most."""
    block_v = triton.next_power_of_2(vocab)
    return {"BLOCK_V": block_v, "num_warps": min(1024, max(128, block_v // 8)) // warp_size}


def sequence_sum(values: Tensor, cu_seqlens: list[int]) -> Tensor:
    """(…, N) -> (…, S) fp32."""
    values, num_sequences = values.contiguous(), len(cu_seqlens) - 1
    sums = torch.empty(*values.shape[:-1], num_sequences, dtype=torch.float32, device=values.device)
    if sums.numel():
        grid = (num_sequences, sums.numel() // num_sequences)
        _sequence_sum_kernel[grid](values, values.shape[-1], _on(values.device, cu_seqlens), sums, BLOCK_N=BLOCK_N)
    return sums


def sequence_spread(values: Tensor, cu_seqlens: list[int]) -> Tensor:
    """(S,) -> (N,): each row has its sequence's value."""
    out = torch.empty(cu_seqlens[-1], dtype=values.dtype, device=values.device)
    if len(out):
        bounds = _on(values.device, cu_seqlens)
        _sequence_spread_kernel[(len(values),)](values.contiguous(), bounds, out, BLOCK_N=BLOCK_N)
    return out


def _on(device: torch.device, cu_seqlens: list[int]) -> Tensor:
    return to_device([torch.tensor(cu_seqlens, dtype=torch.int64, device="cpu")], device)[0]


def scale_rows(
    rows: Tensor,  # (n, H)
    scale: Tensor,  # (n,)
    *,
    factor: Tensor | float = 1.0,  # () or a number
    labels: Tensor | None = None,  # (n,): rows that are not scored come out zero whatever they hold
    dtype: torch.dtype | None = None,
    inplace: bool = False,
) -> Tensor:
    """factor · scale_t · rows_t, rounded once to dtype; overwrites rows if they are of dtype already and may be."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (n, size), dtype = rows.shape, rows.dtype if dtype is None else dtype
    out = rows if inplace and rows.dtype == dtype else torch.empty(n, size, dtype=dtype, device=rows.device)
    if out.numel():
        on_device = isinstance(factor, Tensor)
        block_h = min(BLOCK_H, triton.next_power_of_2(size))
        _scale_rows_kernel[(n, triton.cdiv(size, block_h))](
            rows, rows.stride(0), out, out.stride(0), scale if labels is None else labels, scale, scale.stride(0),
            1.0 if on_device else float(factor), factor if on_device else scale, size, HAS_LABELS=labels is not None,
            HAS_FACTOR=on_device, BLOCK_H=block_h,
        )  # fmt: skip
    return out


def times(acc: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor · acc, rounded once to dtype; overwrites acc where that is of dtype already."""
    in_place = acc.dtype == dtype
    out = acc if in_place else torch.empty(acc.shape, dtype=dtype, device=acc.device)
    if total := acc.numel():
        _times_kernel[(triton.cdiv(total, TIMES_BLOCK),)](acc, factor, out, total, IN_PLACE=in_place, BLOCK=TIMES_BLOCK)
    return out
