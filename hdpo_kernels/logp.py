"""Differentiable log-probabilities per token, for losses written outside: 1 GEMM forward, 3 backward, no logits."""

from dataclasses import astuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hdpo_kernels.checks import check_head
from hdpo_kernels.lm_head import HeadOptions, LMHead, ScoredRows, WeightGrad, full_precision, times
from hdpo_kernels.naive import TokenLogp
from hdpo_kernels.ops import operator


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: str = "exact",
    chunk_bytes: int | None = None,
) -> TokenLogp:
    """log softmax(softcap · tanh(logit_scale · (h Wᵀ + b) / softcap)) at the label, and its entropy, per row.

    hidden (N, H) and weight (V, H) of one dtype (fp32, bf16, fp16 or fp64; under autocast both are cast to its dtype),
    labels (N,) int64 on hidden's device or the CPU, -100 = not scored, bias (V,). Labels on the CPU are checked against
    the vocabulary, and rows not scored skip the head; elsewhere a label outside the vocabulary gives NaN.
    chunk_bytes: most bytes of logits and their gradient held at a time (on a CPU kept for the thread's next call).

    Returns TokenLogp(logp (N,), entropy (N,)), nats, fp32 (fp64 for fp64), zero where not scored. `logp` is
    differentiable in hidden, weight and bias; logits are recomputed in backward (4 GEMMs in all). `entropy` is not:
    a gradient into it raises NotImplementedError (detach it, or use naive.linear_logp).

    Raises ValueError / TypeError for shapes, dtypes, devices or options that do not fit.
    """
    options = HeadOptions(softcap, logit_scale, chunk_bytes)
    check_head(hidden, weight, labels, bias, gradient)
    dtype, needs = compute_dtype(hidden), needs_grad(hidden, weight, bias)
    return TokenLogp(*LinearLogp.apply(hidden, weight, bias, labels, *astuple(options), dtype, needs))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:  # autocast leaves fp64 alone, and so do we
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def needs_grad(*tensors: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]


def _fake_linear_logp(hidden, weight, bias, labels, *options):
    dtype = full_precision(options[-1])
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)


@operator(_fake_linear_logp)
def _linear_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """logp (N,), entropy (N,)"""
    options = HeadOptions(softcap, logit_scale, chunk_bytes)
    rows = ScoredRows(labels, weight.shape[0], hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        head = LMHead(rows.select(hidden), weight, bias, rows.labels, options, dtype, with_grad=False)
        for start, end in head.pieces():
            head.score(start, end)
    return rows.spread(head.logp), rows.spread(head.entropy)


def _fake_linear_logp_backward(d_logp, hidden, weight, bias, labels, *options):
    return [t.new_empty(t.shape) for t, need in zip((hidden, weight, bias), options[-1], strict=True) if need]


@operator(_fake_linear_logp_backward)
def _linear_logp_backward(
    d_logp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """Those of d_hidden (N, H), d_weight (V, H), d_bias (V,) that `needs` names."""
    options = HeadOptions(softcap, logit_scale, chunk_bytes)
    rows = ScoredRows(labels, weight.shape[0], hidden.device)
    d_logp = rows.select(d_logp)
    # What the loss scales rows by can be of any size; relative to the largest it cannot overflow fp16.
    largest = d_logp.abs().amax().clamp(min=torch.finfo(d_logp.dtype).tiny) if d_logp.numel() else d_logp.new_ones(())
    relative = d_logp / largest
    with torch.autocast(hidden.device.type, enabled=False):
        head = LMHead(rows.select(hidden), weight, bias, rows.labels, options, dtype, with_grad=True)
        d_hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if needs[0] else None
        d_weight = WeightGrad(head, *needs[1:])
        for start, end in head.pieces():
            grad = head.score(start, end)
            if d_hidden is not None:
                torch.mm(grad, head.weight, out=d_hidden[start:end])
            d_weight.add(head, grad, start, end, relative[start:end])
        results = [] if d_hidden is None else [rows.spread(d_hidden.to(hidden.dtype).mul_(d_logp.unsqueeze(1)))]
        for acc, tensor in zip(d_weight.total(), (weight, bias), strict=True):
            if acc is not None and tensor is not None:
                results.append(times(acc, largest, tensor.dtype))
    return results


class LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, *options):
        *ctx.options, ctx.needs = options
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.set_materialize_grads(False)
        return _linear_logp(hidden, weight, bias, labels, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logp, d_entropy):
        if d_entropy is not None:
            if not torch.compiler.is_compiling():
                raise NotImplementedError(
                    "linear_logp has no gradient through entropy: detach it, or use hdpo_kernels.naive.linear_logp"
                )
            # A compiled graph passes zeros where nothing flows; what does flow must not be lost silently.
            d_entropy = torch.where(d_entropy == 0, 0.0, torch.nan)
            d_logp = d_entropy if d_logp is None else d_logp + d_entropy
        if d_logp is None:
            return (None,) * (5 + len(ctx.options))
        grads = iter(_linear_logp_backward(d_logp, *ctx.saved_tensors, *ctx.options, ctx.needs))
        return *(next(grads) if need else None for need in ctx.needs), *(None,) * (2 + len(ctx.options))
