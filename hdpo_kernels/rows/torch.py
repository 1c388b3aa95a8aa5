"""Row operations with torch alone: CPU, MPS, and fp64 on any device.

n rows, V vocabulary. On a CPU the rows are walked in blocks that stay in the L2 cache, so that a dozen elementwise
passes cost about as much memory traffic as two.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hdpo_kernels.naive import IGNORE_INDEX
from hdpo_kernels.sampled.entries import DRAWS, Sampling

BLOCK_BYTES = 2 * 2**20  # of logits; as much again is scratch: together the L2 cache of two current CPU cores
# Probabilities below 2⁻⁸⁰ become zero in the gradient: a denormal number in a GEMM operand, or a denormal product,
# makes a CPU's GEMM ten times slower, and 2⁻⁸⁰ is 17 orders of magnitude below the rounding of the gradient row itself.
_FLUSH_BELOW = 2.0**-80


class RowStats(NamedTuple):
    lse: Tensor  # (n,) log-sum-exp of the logits after bias, scale and softcap
    logp: Tensor  # (n,) label's log-probability; 0 where the label is -100
    entropy: Tensor  # (n,) nats; 0 where the label is -100


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
    if merge is not None:
        return _sharded_row_stats(logits, labels, bias, softcap, logit_scale, grad_out, merge)
    n, vocab = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    top, total, largest, label_z, sum_pz = torch.empty(5, n, dtype=dtype, device=logits.device)
    # A label outside the vocabulary must not index: its log-probability is NaN, and so is the loss.
    scored, valid = labels != IGNORE_INDEX, (labels >= 0) & (labels < vocab)
    y, all_scored = labels.masked_fill(~valid, 0).unsqueeze(1), bool(scored.all())
    block = n if logits.device.type != "cpu" else max(1, BLOCK_BYTES // max(1, vocab * dtype.itemsize))
    scratch = torch.empty(min(block, n), vocab, dtype=dtype, device=logits.device)
    for start in range(0, n, max(block, 1)):
        rows = slice(start, min(start + block, n))
        z = logits[rows].to(dtype, copy=not overwrite)
        p = scratch[: rows.stop - start]
        if bias is not None:
            z.add_(bias)
        if logit_scale != 1.0:
            z.mul_(logit_scale)
        tanh = None
        if softcap is not None:
            z.div_(softcap).tanh_()
            tanh = z.clone() if grad_out is not None else None
            z.mul_(softcap)

        torch.amax(z, 1, out=top[rows])
        z.sub_(top[rows].unsqueeze(1))
        label_z[rows] = z.gather(1, y[rows]).squeeze(1)
        torch.softmax(z, 1, out=p)
        # torch's softmax adds up a row plainly, which at V = 32,000 is off by up to 3e-5; `sum` is pairwise. Divided by
        # their own sum, the probabilities have all their digits again, and the largest is 1 / Σ e^z.
        torch.sum(p, 1, out=total[rows])
        torch.amax(p, 1, out=largest[rows])
        torch.sum(z.mul_(p), 1, out=sum_pz[rows])
        if not sum_pz[rows].isfinite().all():  # 0 · −inf from a vocabulary entry switched off by a bias of −inf
            torch.sum(z.masked_fill_(p == 0, 0), 1, out=sum_pz[rows])
        if grad_out is None:
            continue
        if isinstance(grad_out, Sampling):
            p.div_(total[rows].unsqueeze(1))
            _sample(p, y[rows], valid[rows], scored[rows], tanh, logit_scale, grad_out.rows(rows))
            continue

        torch.threshold_(p, _FLUSH_BELOW, 0.0)
        grad = torch.mul(p, -1 / total[rows].unsqueeze(1), out=z)
        grad.scatter_add_(1, y[rows], valid[rows].unsqueeze(1).to(dtype))
        if tanh is not None:
            grad.addcmul_(grad * tanh, tanh, value=-1)  # · (1 − tanh²), the softcap's derivative
        if logit_scale != 1.0:
            grad.mul_(logit_scale)
        if not all_scored:
            grad.masked_fill_(~scored[rows].unsqueeze(1), 0)
        if grad.data_ptr() != grad_out[rows].data_ptr():
            grad_out[rows] = grad
    log_total = (total / largest).log_()
    logp = (label_z - log_total).masked_fill_(~valid, torch.nan).masked_fill_(~scored, 0)
    return RowStats(top + log_total, logp, torch.where(scored, log_total - sum_pz / total, 0))


def _sharded_row_stats(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    grad_out: Tensor | Sampling | None,
    merge: Callable[[Tensor], Tensor],
) -> RowStats:
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
    top, log_total, logp, entropy = merge(torch.stack([top, log_total, own.logp, own.entropy]))
    if grad_out is not None:
        p = (z - top.unsqueeze(1)).sub_(log_total.unsqueeze(1)).exp_()
        grad = torch.threshold_(p, _FLUSH_BELOW, 0.0).neg_()
        here = scored & (labels >= 0) & (labels < z.shape[1])
        grad.scatter_add_(1, labels.masked_fill(~here, 0).unsqueeze(1), here.unsqueeze(1).to(grad.dtype))
        if tanh is not None:
            grad.mul_(1 - tanh.square())
        grad_out.copy_(grad.mul_(logit_scale).masked_fill_(~scored.unsqueeze(1), 0))
    return RowStats(top + log_total, logp.masked_fill(~scored, 0), entropy.masked_fill(~scored, 0))


def _sample(
    p: Tensor,  # (n, V) probabilities
    y: Tensor,  # (n, 1) labels, any number inside the vocabulary where they are not valid
    valid: Tensor,  # (n,)
    scored: Tensor,  # (n,)
    tanh: Tensor | None,  # (n, V) of the softcap
    logit_scale: float,
    sampling: Sampling,
) -> None:
    """Rows of ∂logp/∂logits, rounded to entries: the label and p ≥ ε exactly, of the others some as ε.

    A running sum of the others in units of ε starts at the row's random number; where it passes an integer, that entry
    is taken. Of the sum only the fraction is kept, in fixed point: exact, so no probability is lost or taken twice.
    """
    epsilon, draws, entries = sampling
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
    """(N,) -> (S,). One `sum` a sequence: torch's is pairwise, so 64k tokens do not lose digits."""
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
    return torch.stack([part.sum() for part in values.split(lengths)]) if lengths else values.new_zeros(0)
