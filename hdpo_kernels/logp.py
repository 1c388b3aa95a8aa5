"""Differentiable log-probabilities per token, for losses written outside: 1 GEMM forward, 3 backward, no logits."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hdpo_kernels.checks import check_head
from hdpo_kernels.lm_head import HeadOptions, LMHead, WeightGrad
from hdpo_kernels.naive import IGNORE_INDEX, TokenLogp


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
    chunk_bytes: most bytes of logits and their gradient held at a time.

    Returns TokenLogp(logp (N,), entropy (N,)), nats, fp32 (fp64 for fp64), zero where not scored. `logp` is
    differentiable in hidden, weight and bias; logits are recomputed in backward (4 GEMMs in all). `entropy` is not:
    a gradient into it raises NotImplementedError (detach it, or use naive.linear_logp).

    Raises ValueError / TypeError for shapes, dtypes, devices or options that do not fit.
    """
    options = HeadOptions(softcap, logit_scale, chunk_bytes)
    check_head(hidden, weight, labels, bias, gradient)
    keep = scored_rows(labels)
    if keep is None:
        return TokenLogp(*_apply(hidden, weight, bias, labels.to(hidden.device, non_blocking=True), options))
    index = keep.to(hidden.device, non_blocking=True)
    logp, entropy = _apply(
        hidden.index_select(0, index), weight, bias, labels[keep].to(hidden.device, non_blocking=True), options
    )
    full = logp.new_zeros(hidden.shape[0])
    return TokenLogp(full.index_copy(0, index, logp), full.index_copy(0, index, entropy))


def scored_rows(labels: Tensor) -> Tensor | None:
    """Indices of the scored rows, or None for "all", or where finding out would cost a device sync."""
    if labels.device.type != "cpu":
        return None
    scored = labels != IGNORE_INDEX
    return None if scored.all() else scored.nonzero().squeeze(1)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:  # autocast leaves fp64 alone, and so do we
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: HeadOptions):
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return LinearLogp.apply(hidden, weight, bias, labels, options, dtype)


class LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options, dtype):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.options, ctx.dtype = options, dtype
        head = LMHead(hidden.to(dtype), weight.to(dtype), cast_or_none(bias, dtype), labels, options, with_grad=False)
        for start in range(0, hidden.shape[0], head.piece_rows):
            head.score(start, min(start + head.piece_rows, hidden.shape[0]))
        return head.logp, head.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logp, d_entropy):
        if d_entropy is not None:
            raise NotImplementedError(
                "linear_logp has no gradient through entropy: detach it, or use hdpo_kernels.naive.linear_logp"
            )
        if d_logp is None:
            return (None,) * 6
        hidden, weight, bias, labels = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = ctx.dtype
        # What the loss scales rows by can be of any size; relative to the largest it cannot overflow fp16.
        largest = (
            d_logp.abs().amax().clamp(min=torch.finfo(d_logp.dtype).tiny) if d_logp.numel() else d_logp.new_ones(())
        )
        relative = d_logp / largest
        head = LMHead(
            hidden.to(dtype), weight.to(dtype), cast_or_none(bias, dtype), labels, ctx.options, with_grad=True
        )
        d_hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if need_hidden else None
        d_weight = WeightGrad(head, need_weight, need_bias) if need_weight or need_bias else None
        for start in range(0, hidden.shape[0], head.piece_rows):
            end = min(start + head.piece_rows, hidden.shape[0])
            grad = head.score(start, end)
            if d_hidden is not None:
                torch.mm(grad, head.weight, out=d_hidden[start:end])
            if d_weight is not None:
                d_weight.add(head, grad, start, end, relative[start:end])
        if d_hidden is not None:
            d_hidden = d_hidden.to(hidden.dtype).mul_(d_logp.unsqueeze(1))
        grads = (None, None) if d_weight is None else d_weight.times(largest, (weight.dtype, dtype_or_none(bias)))
        return d_hidden, *grads, None, None, None


def cast_or_none(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def dtype_or_none(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype
