"""Row operations with torch alone: CPU, MPS, and fp64 on any device.

n rows, V vocabulary. On a CPU the rows are walked in blocks that stay in the L2 cache, so that a dozen elementwise
passes cost about as much memory traffic as two.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hdpo_kernels.device import to_device
from hdpo_kernels.naive import IGNORE_INDEX, TokenLogp
from hdpo_kernels.sampled.entries import DRAWS, Sampling

BLOCK_BYTES = 2 * 2**20  # of logits; as much again is scratch: together the L2 cache of two current CPU cores
# Probabilities below 2⁻⁸⁰ become zero in the gradient: a denormal number in a GEMM operand, or a denormal product,
# makes a CPU's GEMM ten times slower, and 2⁻⁸⁰ is 17 orders of magnitude below the rounding of the gradient row itself.
_FLUSH_BELOW = 2.0**-80


def row_stats(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n,) int64
    *,
    out: TokenLogp | None = None,  # where the statistics go
    all_scored: bool = False,  # labels are known to be inside the vocabulary, none of them -100
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    # Receives ∂logp/∂logits, zero at label -100: (n, V) of any dtype, may be logits; or entries, rounded.
    grad_out: Tensor | Sampling | None = None,
    overwrite: bool = True,  # the logits may be used as scratch
    merge: Callable[[Tensor], Tensor] | None = None,  # logits are a shard of the vocabulary: see parallel.VocabShard
) -> TokenLogp:
    n, vocab = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    out = TokenLogp(*torch.empty(3, n, dtype=dtype, device=logits.device)) if out is None else out
    if merge is not None:
        sharded = _sharded_row_stats(logits, labels, bias, softcap, logit_scale, grad_out, merge)
        return TokenLogp(*(mine.copy_(of_all) for mine, of_all in zip(out, sharded, strict=True)))
    # What has one number a row is computed once for all rows, not a block at a time.
    numbers = torch.empty(5, n, 1, dtype=dtype, device=logits.device)  # top, total, largest, label_z, sum_pz
    y, ignored, valid = labels.unsqueeze(1), None, None
    if not all_scored:
        # A label outside the vocabulary must not index: its log-probability is NaN, and so is the loss.
        ignored, valid = y == IGNORE_INDEX, (y >= 0) & (y < vocab)
        y = y.masked_fill(~valid, 0)
    block = max(1, n if logits.device.type != "cpu" else BLOCK_BYTES // max(1, vocab * dtype.itemsize))
    scratch = torch.empty(min(block, n), vocab, dtype=dtype, device=logits.device)
    for start in range(0, n, block):
        rows = slice(start, min(start + block, n))
        z, label, block_numbers, p = logits, y, numbers, scratch
        if n > block:  # a small call is a few operations, and spared these
            z, label, block_numbers, p = z[rows], label[rows], numbers[:, rows], scratch[: rows.stop - start]
        z = z.to(dtype, copy=not overwrite)
        top, total, largest, label_z, sum_pz = block_numbers.unbind(0)
        if bias is not None:
            z.add_(bias)
        if logit_scale != 1.0:
            z.mul_(logit_scale)
        tanh = None
        if softcap is not None:
            z.div_(softcap).tanh_()
            tanh = z.clone() if grad_out is not None else None
            z.mul_(softcap)

        torch.amax(z, 1, keepdim=True, out=top)
        z.sub_(top)
        torch.gather(z, 1, label, out=label_z)
        torch.softmax(z, 1, out=p)
        # torch's softmax adds up a row plainly, which at V = 32,000 is off by up to 3e-5; `sum` is pairwise. Divided by
        # their own sum, the probabilities have all their digits again, and the largest is 1 / Σ e^z.
        torch.sum(p, 1, keepdim=True, out=total)
        torch.amax(p, 1, keepdim=True, out=largest)
        torch.sum(z.mul_(p), 1, keepdim=True, out=sum_pz)
        if not math.isfinite(sum_pz.sum()):  # 0 · −inf from a vocabulary entry switched off by a bias of −inf
            torch.sum(z.masked_fill_(p == 0, 0), 1, keepdim=True, out=sum_pz)
        if grad_out is None:
            continue
        if isinstance(grad_out, Sampling):
            _sample(p.div_(total), labels[rows], tanh, logit_scale, grad_out.rows(rows))
            continue

        torch.threshold_(p, _FLUSH_BELOW, 0.0)
        grad = torch.mul(p, total.reciprocal().neg_(), out=z)
        grad.scatter_add_(1, label, torch.ones_like(total) if valid is None else valid[rows].to(dtype))
        if tanh is not None:
            grad.addcmul_(grad * tanh, tanh, value=-1)  # · (1 − tanh²), the softcap's derivative
        if logit_scale != 1.0:
            grad.mul_(logit_scale)
        if ignored is not None:
            grad.masked_fill_(ignored[rows], 0)
        here = grad_out if n <= block else grad_out[rows]
        if grad.data_ptr() != here.data_ptr():
            here.copy_(grad)
    _, total, largest, label_z, sum_pz = numbers.view(5, n).unbind(0)
    log_total = (total / largest).log_()
    torch.eq(label_z, 0, out=out.is_top1)  # the maximum is subtracted
    torch.sub(label_z, log_total, out=out.logp)
    torch.sub(log_total, sum_pz.div_(total), out=out.entropy)
    if valid is not None and ignored is not None:
        ignored = ignored.squeeze(1)
        out.logp.masked_fill_(~valid.squeeze(1), torch.nan).masked_fill_(ignored, 0)
        out.entropy.masked_fill_(ignored, 0)
        out.is_top1.masked_fill_(~valid.squeeze(1), 0)
    return out


def _sharded_row_stats(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    grad_out: Tensor | Sampling | None,
    merge: Callable[[Tensor], Tensor],
) -> TokenLogp:
    """In two passes: what is merged is known after the first."""
    assert not isinstance(grad_out, Sampling)
    scored = labels != IGNORE_INDEX
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = (z if bias is None else z + bias) * logit_scale
    tanh = None
    if softcap is not None:
        tanh = (z / softcap).tanh_()
        z = softcap * tanh
    top = z.amax(1)
    log_total = (z - top.unsqueeze(1)).exp_().sum(1).log_()
    own = row_stats(z, labels, overwrite=False)
    top, log_total, *merged = merge(torch.stack([top, log_total, *own]))
    if grad_out is not None:
        p = (z - top.unsqueeze(1)).sub_(log_total.unsqueeze(1)).exp_()
        grad = torch.threshold_(p, _FLUSH_BELOW, 0.0).neg_()
        here = scored & (labels >= 0) & (labels < z.shape[1])
        grad.scatter_add_(1, labels.masked_fill(~here, 0).unsqueeze(1), here.unsqueeze(1).to(grad.dtype))
        if tanh is not None:
            grad.mul_(1 - tanh.square())
        grad_out.copy_(grad.mul_(logit_scale).masked_fill_(~scored.unsqueeze(1), 0))
    return TokenLogp(*(of_all.masked_fill(~scored, 0) for of_all in merged))


def _sample(
    p: Tensor,  # (n, V) probabilities
    labels: Tensor,  # (n,)
    tanh: Tensor | None,  # (n, V) of the softcap
    logit_scale: float,
    sampling: Sampling,
) -> None:
    """Rows of ∂logp/∂logits, rounded to entries: the label and p ≥ ε exactly, of the others some as ε.

    A running sum of the others in units of ε starts at the row's random number; where it passes an integer, that entry
    is taken. Of the sum only the fraction is kept, in fixed point: exact, so no probability is lost or taken twice.
    """
    epsilon, draws, entries = sampling
    valid, scored = (labels >= 0) & (labels < p.shape[1]), labels != IGNORE_INDEX
    y = labels.masked_fill(~valid, 0).unsqueeze(1)
    kept = p < epsilon
    kept.logical_not_()  # a NaN is kept
    kept.scatter_(1, y, kept.gather(1, y) | valid.unsqueeze(1))
    # the largest fp32 below 1: for an ε that is no power of two, p / ε may round up to it
    steps = (p * (1 / epsilon)).clamp_(max=1 - 2.0**-24).mul_(DRAWS).masked_fill_(kept, 0).long()
    sums = steps.cumsum(1).add_(draws.unsqueeze(1)).bitwise_and_(DRAWS - 1)
    taken = (sums < steps).logical_or_(kept).logical_and_(scored.unsqueeze(1))

    counts = taken.sum(1)
    row, column = taken.nonzero().unbind(1)
    index = torch.arange(len(row), device=p.device) - (counts.cumsum(0) - counts)[row]
    if (counts > entries.columns.shape[1]).any():  # NaN rows alone are kept whole
        fits = index < entries.columns.shape[1]
        row, column, index = row[fits], column[fits], index[fits]
    value = torch.where(kept[row, column], p[row, column], epsilon).neg_()
    value += (column == y.squeeze(1)[row]) & valid[row]
    if tanh is not None:
        value *= 1 - tanh[row, column].square()
    entries.columns[row, index] = column.int()
    entries.values[row, index] = value.mul_(logit_scale)
    entries.counts.copy_(counts.clamp_(max=entries.columns.shape[1]))


def sequence_sum(values: Tensor, cu_seqlens: list[int]) -> Tensor:
    """(…, N) -> (…, S). One `sum` a sequence: torch's is pairwise, so 64k tokens do not lose digits."""
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
    if not lengths:
        return values.new_zeros(*values.shape[:-1], 0)
    return torch.stack([part.sum(-1) for part in values.split(lengths, -1)], -1)


def sequence_spread(values: Tensor, cu_seqlens: list[int]) -> Tensor:
    """(S,) -> (N,): each row has its sequence's value."""
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
    (repeats,) = to_device([torch.tensor(lengths, dtype=torch.int64, device="cpu")], values.device)
    return values.repeat_interleave(repeats, output_size=cu_seqlens[-1])


def scale_rows(
    rows: Tensor,  # (n, H)
    scale: Tensor,  # (n,)
    *,
    factor: Tensor | float = 1.0,  # () or a number
    labels: Tensor | None = None,  # (n,): rows that are not scored come out zero whatever they hold, 0 · NaN is NaN
    dtype: torch.dtype | None = None,
    inplace: bool = False,
) -> Tensor:
    """factor · scale_t · rows_t, rounded once to dtype; overwrites rows if they are of dtype already and may be."""
    dtype = rows.dtype if dtype is None else dtype
    # Rounded on the way out: no full-precision copy of the rows.
    out = rows if inplace and rows.dtype == dtype else torch.empty(rows.shape, dtype=dtype, device=rows.device)
    scale = scale if isinstance(factor, float) and factor == 1.0 else scale * factor
    torch.mul(rows, scale.unsqueeze(1), out=out)
    return out if labels is None else out.masked_fill_((labels == IGNORE_INDEX).unsqueeze(1), 0)


def times(acc: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor · acc, rounded once to dtype; overwrites acc where that is of dtype already."""
    looks = type(factor) is Tensor and not torch.compiler.is_compiling()  # a FakeTensor has no value
    if looks and factor.device.type == "cpu" and factor == 1 and acc.dtype == dtype:
        return acc  # a pass over d_weight saved; on another device the look would be a sync
    return torch.mul(acc, factor, out=acc if acc.dtype == dtype else acc.new_empty(acc.shape, dtype=dtype))
