"""Differentiable log-probabilities per token, for losses written outside, without logits.

Exact gradient: 1 GEMM forward, 3 backward. Sampled gradient: 1 GEMM forward, two sparse products backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hdpo_kernels.checks import check_gradient, check_head
from hdpo_kernels.lm_head import HeadOptions, LMHead, ScoredRows, WeightGrad, full_precision
from hdpo_kernels.naive import TokenLogp
from hdpo_kernels.ops import operator
from hdpo_kernels.rows import backend
from hdpo_kernels.sampled import products
from hdpo_kernels.sampled.entries import Entries, Sampling, draw, new_entries


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: str = "exact",
    epsilon: float = 2**-10,
    chunk_bytes: int | None = None,
) -> TokenLogp:
    """log softmax(softcap · tanh(logit_scale · (h Wᵀ + b) / softcap)) at the label, and its entropy, per row.

    Args:
        hidden: (N, H) fp32, bf16, fp16 or fp64. Under autocast hidden and weight are cast to its dtype.
        weight: (V, H) of the LM head, of hidden's dtype.
        labels: (N,) int64, -100 = not scored, on hidden's device or the CPU. On the CPU they are checked, and rows that
            are not scored skip the head; elsewhere a label outside the vocabulary gives NaN.
        bias: (V,) of the LM head.
        softcap: cap of the logits by tanh; None: no cap.
        logit_scale: factor on the logits.
        gradient: "exact" recomputes logits in backward (4 GEMMs in all). "sampled" rounds each row of ∂logp/∂logits,
            without bias, to at most 1/epsilon + 2 entries (README.md beside this file): 1 GEMM in all, and
            8 · (1/epsilon + 2) bytes a row kept for backward. `torch.manual_seed` reproduces its random numbers.
        epsilon: of "sampled", in (0, 0.5]; probabilities from it on are exact; smaller is less noise and more entries.
        chunk_bytes: most bytes of logits and their gradient held at a time (on a CPU kept for the thread's next call).

    Returns:
        TokenLogp(logp (N,), entropy (N,), is_top1 (N,)), nats, and 1 where no logit is larger than the label's, else 0;
        fp32 (fp64 for fp64), zero where not scored. `logp` is differentiable in hidden, weight and bias. `entropy` is
        not: a gradient into it raises NotImplementedError (detach it, or use naive.linear_logp).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
    """
    options = HeadOptions(softcap, logit_scale, chunk_bytes)
    check_head(hidden, weight, labels, bias)
    check_gradient(gradient, epsilon, weight.shape[0])
    dtype, needs = compute_dtype(hidden), needs_grad(hidden, weight, bias)
    # Drawn out here, where torch.compile and checkpointing see to it that a second forward draws the same.
    draws = draw(hidden.shape[0], hidden.device) if gradient == "sampled" and any(needs) else None
    return TokenLogp(*LinearLogp.apply(hidden, weight, bias, labels, draws, epsilon, *options.arguments, dtype, needs))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:  # autocast leaves fp64 alone, and so do we
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def needs_grad(*tensors: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]


def _fake_linear_logp(hidden, weight, bias, labels, draws, epsilon, *options):
    num_rows, dtype = hidden.shape[0], full_precision(options[-1])
    stats = (hidden.new_empty(num_rows, dtype=dtype) for _ in TokenLogp._fields)
    return *stats, [] if draws is None else list(new_entries(num_rows, epsilon, dtype, hidden.device))


@operator(_fake_linear_logp)
def _linear_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    draws: Tensor | None,
    epsilon: float,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """logp, entropy, is_top1 (N,), and with draws the `Entries` of rows that go through the head, first of all rows."""
    options = HeadOptions(softcap, logit_scale, chunk_bytes)
    rows = ScoredRows(labels, weight.shape[0], hidden.device)
    sampling = None
    if draws is not None:
        entries = new_entries(hidden.shape[0], epsilon, full_precision(dtype), hidden.device)
        sampling = Sampling(epsilon, rows.select(draws), entries)
    head = LMHead(hidden, weight, bias, rows, options, dtype, False, sampling)
    for start, end in head.pieces():
        head.score(start, end)
    logp, *others = head.stats
    entropy, is_top1 = (rows.spread(other.clone()) for other in others)  # results of an operator share no memory
    return rows.spread(logp), entropy, is_top1, [] if sampling is None else list(sampling.entries)


def _fake_linear_logp_backward(d_logp, hidden, weight, bias, labels, entries, *options):
    return [t.new_empty(t.shape) for t, need in zip((hidden, weight, bias), options[-1], strict=True) if need]


@operator(_fake_linear_logp_backward)
def _linear_logp_backward(
    d_logp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    entries: list[Tensor],
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """Those of d_hidden (N, H), d_weight (V, H), d_bias (V,) that `needs` names; by the entries, if there are any."""
    rows = ScoredRows(labels, weight.shape[0], hidden.device)
    if entries:
        return _sparse_backward(rows, rows.select(d_logp), hidden, weight, bias, Entries(*entries), needs)
    options = HeadOptions(softcap, logit_scale, chunk_bytes)
    return _recomputing_backward(rows, rows.select(d_logp), hidden, weight, bias, options, dtype, needs)


def _sparse_backward(
    rows: ScoredRows,
    d_logp: Tensor,  # (scored,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Entries,
    needs: list[bool],
) -> list[Tensor]:
    entries = entries.rows(slice(0, len(d_logp)))
    sparse = products(entries.values)
    results = []
    if needs[0]:
        results.append(rows.spread(sparse.gather(entries, weight, d_logp, hidden.dtype)))
    if any(needs[1:]):
        vocab = weight.shape[0]
        grads = sparse.gather_transposed(entries, rows.select(hidden), d_logp, vocab, weight.dtype, *needs[1:])
        for grad, tensor in zip(grads, (weight, bias), strict=True):
            if grad is not None and tensor is not None:
                results.append(grad.to(tensor.dtype))
    return results


def _recomputing_backward(
    rows: ScoredRows,
    d_logp: Tensor,  # (scored,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    # What the loss scales rows by can be of any size; relative to the largest it cannot overflow fp16.
    largest = d_logp.abs().amax().clamp(min=torch.finfo(d_logp.dtype).tiny) if d_logp.numel() else d_logp.new_ones(())
    # The buffers of the head are gone before d_weight is rounded: both together would be the peak.
    d_hidden, d_weight = _recompute(
        LMHead(hidden, weight, bias, rows, options, dtype, with_grad=True), d_logp / largest, needs
    )
    results = []
    if d_hidden is not None:
        scaled = backend(d_logp).scale_rows(d_hidden, d_logp, dtype=hidden.dtype, inplace=True)
        results.append(rows.spread(scaled))
    for acc, tensor in zip(d_weight.total(), (weight, bias), strict=True):
        if acc is not None and tensor is not None:
            results.append(backend(acc).times(acc, largest, tensor.dtype))
    return results


def _recompute(head: LMHead, scale: Tensor, needs: list[bool]) -> tuple[Tensor | None, WeightGrad]:
    """d_hidden (scored, H), still without scale, and d_weight, with it."""
    d_hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if needs[0] else None
    d_weight = WeightGrad(head, *needs[1:])
    for start, end in head.pieces():
        grad = head.score(start, end)
        if d_hidden is not None:
            torch.mm(grad, head.weight, out=d_hidden[start:end])
        d_weight.add(head, grad, start, end, scale[start:end])
    return d_hidden, d_weight


class LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, draws, epsilon, *options):
        *ctx.options, ctx.needs = options
        logp, entropy, is_top1, entries = _linear_logp(hidden, weight, bias, labels, draws, epsilon, *ctx.options)
        ctx.save_for_backward(hidden, weight, bias, labels, *entries)
        ctx.mark_non_differentiable(is_top1)
        ctx.set_materialize_grads(False)
        return logp, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logp, d_entropy, _):
        if d_entropy is not None:
            if not torch.compiler.is_compiling():
                raise NotImplementedError(
                    "linear_logp has no gradient through entropy: detach it, or use hdpo_kernels.naive.linear_logp"
                )
            # A compiled graph passes zeros where nothing flows; what does flow must not be lost silently.
            d_entropy = torch.where(d_entropy == 0, 0.0, torch.nan)
            d_logp = d_entropy if d_logp is None else d_logp + d_entropy
        none = (None,) * (4 + len(ctx.options))  # labels, draws, epsilon, options, needs
        if d_logp is None:
            return None, None, None, *none
        hidden, weight, bias, labels, *entries = ctx.saved_tensors
        grads = iter(_linear_logp_backward(d_logp, hidden, weight, bias, labels, entries, *ctx.options, ctx.needs))
        return *(next(grads) if need else None for need in ctx.needs), *none
