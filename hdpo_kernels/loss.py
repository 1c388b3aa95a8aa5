"""The H-DPO loss with its gradients in one pass: 3 GEMMs, nothing recomputed, memory bounded at any length.

    hidden, weight, labels ── LMHead.score ──> logp (N,) ── sequence_sum ──> logps (S,) ── pair.evaluate ──> loss ()
    d_hidden, d_weight <──── one scalar per sequence, c (S,) = a · f'(u) + k <──────────────────┘

N scored rows, V vocabulary, H hidden size, S = 2P sequences interleaved chosen, rejected.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hdpo_kernels import pair
from hdpo_kernels.checks import check_cu_seqlens, check_head, check_labels, check_ref_logps
from hdpo_kernels.chunks import plan_chunks
from hdpo_kernels.lm_head import HeadOptions, LMHead, WeightGrad
from hdpo_kernels.logp import cast_or_none, compute_dtype, dtype_or_none, scored_rows
from hdpo_kernels.naive import IGNORE_INDEX, HDPOLoss
from hdpo_kernels.pair import PairOptions
from hdpo_kernels.rows import backend
from hdpo_kernels.sequence import sequence_of_row


def linear_hdpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    ref_logps: Tensor | None,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: str = "exact",
    chunk_bytes: int | None = None,
) -> HDPOLoss:
    """Entropy-controllable DPO (H-DPO, arXiv 2411.07595) from hidden states, without ever holding (N, V) logits.

        ℓ_s = Σ_{t in s} log softmax(softcap · tanh(logit_scale · (h_t Wᵀ + b) / softcap))[y_t]
        z_p = β [(α ℓ_w − ρ_w) − (α ℓ_l − ρ_l)]            L = mean_p −log σ(z_p)

    hidden (N, H), weight (V, H) of one dtype (fp32, bf16, fp16 or fp64; under autocast both are cast to its dtype);
    labels (N,) int64, -100 = not scored, on hidden's device or the CPU (there they are checked, and rows not scored
    skip the head; elsewhere a label outside the vocabulary makes the loss NaN); cu_seqlens (S + 1,) int, boundaries of
    the sequences, chosen and rejected in turn, a list or a CPU tensor (a tensor on another device costs one sync);
    ref_logps (S,) log-probabilities of the reference policy, nats, or None (zeros).
    alpha < 1 sharpens, 1 is DPO, > 1 diversifies. beta, loss_type, label_smoothing, nll_weight: see `pair_loss`.
    bias (V,). chunk_bytes: most bytes of logits and their gradient held at a time.

    Returns HDPOLoss(loss, logps, entropy, chosen_rewards, rejected_rewards, margins); only `loss` carries a gradient.
    Gradients are formed in forward where they are needed and consumed by the first backward. A NaN or inf in the input
    comes out as a NaN loss; a sequence without scored rows, or no pair at all, counts as zero.

    Raises ValueError / TypeError for shapes, dtypes, devices, boundaries, labels or options that do not fit.
    """
    head_options = HeadOptions(softcap, logit_scale, chunk_bytes)
    pair_options = PairOptions(alpha, beta, loss_type, label_smoothing, nll_weight)
    check_head(hidden, weight, labels, bias, gradient)
    bounds = check_cu_seqlens(cu_seqlens, hidden.shape[0], pairs=True)
    check_ref_logps(ref_logps, len(bounds) - 1, hidden.device)

    keep = scored_rows(labels)
    if keep is not None:
        before = torch.cat([torch.zeros(1, dtype=torch.int64), (labels != IGNORE_INDEX).cumsum(0)])
        bounds = before[bounds].tolist()
        hidden, labels = hidden.index_select(0, keep.to(hidden.device, non_blocking=True)), labels[keep]
    labels = labels.to(hidden.device, non_blocking=True)
    needs_grad = torch.is_grad_enabled()
    dtype = compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return HDPOLoss(
            *LinearHDPOLoss.apply(
                hidden, weight, bias, labels, ref_logps, bounds, head_options, pair_options, dtype, needs_grad
            )
        )


class LinearHDPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, labels, ref_logps, cu_seqlens, head_options, pair_options, dtype, needs_grad
    ):  # fmt: skip
        need_hidden, need_weight, need_bias = (needs_grad and need for need in ctx.needs_input_grad[:3])
        need_grad = need_hidden or need_weight or need_bias
        head = LMHead(hidden.to(dtype), weight.to(dtype), cast_or_none(bias, dtype), labels, head_options, need_grad)
        num_pairs = (len(cu_seqlens) - 1) // 2
        lengths = _scored_lengths(labels, cu_seqlens, head.dtype)
        ref_logps = None if ref_logps is None else ref_logps.to(head.dtype)
        a, k = pair.sequence_coefficients(num_pairs, lengths, pair_options)
        unit = pair_options.gradient_unit(num_pairs)

        logps = torch.zeros_like(lengths)
        coefficients = torch.zeros_like(lengths)  # c (S,)
        d_hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if need_hidden else None
        d_weight = WeightGrad(head, need_weight, need_bias) if need_weight or need_bias else None
        spare = None  # a second buffer for d_weight, made when a long pair needs one

        for first, last, pieces in plan_chunks(cu_seqlens, head.piece_rows):
            seqs = slice(2 * first, 2 * last)
            rows = slice(cu_seqlens[seqs.start], cu_seqlens[seqs.stop])
            bounds = [b - rows.start for b in cu_seqlens[seqs.start : seqs.stop + 1]]
            gathered = None  # of a pair in several pieces: Σ a_s g_tᵀ h_t, while f'(u) is not known yet
            if d_weight is not None and len(pieces) > 1:
                if d_weight.empty and not pair_options.nll_weight:
                    gathered = d_weight  # nothing else is in it yet: the first long pair needs no second buffer
                else:
                    gathered = spare = spare or WeightGrad(head, need_weight, need_bias)
                    gathered.empty = True

            for start, end, sequence in pieces:
                grad = head.score(start, end)
                if d_hidden is not None:
                    torch.mm(grad, head.weight, out=d_hidden[start:end])  # unscaled; backward multiplies by c
                if gathered is not None and d_weight is not None:
                    gathered.add(head, grad, start, end, a[sequence].expand(end - start), unit)
                    if pair_options.nll_weight and (sequence, end) == (2 * first, cu_seqlens[2 * first + 1]):
                        # the chosen sequence is complete, and the nll term's share of it known
                        d_weight.fold(gathered, k[sequence] / a[sequence])

            logps[seqs] = backend(head.logp).sequence_sum(head.logp[rows], bounds)
            if not need_grad:
                continue
            slope = pair.slope(logps[seqs], None if ref_logps is None else ref_logps[seqs], lengths[seqs], pair_options)
            coefficients[seqs] = a[seqs] * slope.repeat_interleave(2) + k[seqs]
            if d_weight is None:
                continue
            if gathered is None:
                d_weight.add(
                    head, grad, *pieces[0][:2], coefficients[seqs][sequence_of_row(bounds, hidden.device)], unit
                )
            elif gathered is d_weight:
                d_weight.scale(slope)
            else:
                d_weight.fold(gathered, slope)

        result = pair.evaluate(logps, ref_logps, lengths, pair_options)
        entropy = backend(head.entropy).sequence_sum(head.entropy, cu_seqlens) / lengths.clamp(min=1)
        result = result._replace(entropy=entropy)
        ctx.d_hidden, ctx.d_weight, ctx.coefficients, ctx.cu_seqlens = d_hidden, d_weight, coefficients, cu_seqlens
        ctx.dtypes = (hidden.dtype, weight.dtype, dtype_or_none(bias))
        ctx.mark_non_differentiable(*result[1:])
        ctx.set_materialize_grads(False)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        if d_loss is None:
            return (None,) * 10
        if ctx.coefficients is None:
            raise RuntimeError(_CONSUMED.format("linear_hdpo_loss"))
        d_hidden, grads = ctx.d_hidden, (None, None)
        if d_hidden is not None:
            row_scale = (d_loss * ctx.coefficients)[sequence_of_row(ctx.cu_seqlens, d_hidden.device)]
            d_hidden = d_hidden.to(ctx.dtypes[0]).mul_(row_scale.unsqueeze(1))
        if ctx.d_weight is not None:
            grads = ctx.d_weight.times(d_loss, ctx.dtypes[1:])
        ctx.d_hidden = ctx.d_weight = ctx.coefficients = None
        return d_hidden, *grads, *(None,) * 7


def hdpo_loss(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    ref_logps: Tensor | None,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
) -> HDPOLoss:
    """The same loss from logits (N, V) of any floating dtype; other arguments and result as in `linear_hdpo_loss`.

    inplace: overwrite the logits with their gradient, so that no second (N, V) tensor exists. Allowed where nothing
    else reads them: a leaf that requires grad is refused, and autograd raises if an earlier operation saved them.

    Raises ValueError / TypeError for shapes, dtypes, devices, boundaries, labels or options that do not fit.
    """
    head_options = HeadOptions(softcap, logit_scale)
    pair_options = PairOptions(alpha, beta, loss_type, label_smoothing, nll_weight)
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating of shape (N, V), got {logits.dtype} {tuple(logits.shape)}")
    base = logits if logits._base is None else logits._base
    if inplace and base.is_leaf and base.requires_grad:
        raise ValueError("inplace=True would overwrite a leaf that requires grad, or a view of one; pass inplace=False")
    if inplace and logits.stride(1) != 1:
        raise ValueError(f"inplace=True needs rows without gaps, got strides {logits.stride()}; pass inplace=False")
    check_labels(labels, logits.shape[0], logits.shape[1], logits.device)
    bounds = check_cu_seqlens(cu_seqlens, logits.shape[0], pairs=True)
    check_ref_logps(ref_logps, len(bounds) - 1, logits.device)
    labels = labels.to(logits.device, non_blocking=True)
    if logits.stride(1) != 1:
        logits, inplace = logits.contiguous(), True  # row operations walk along rows; the copy is ours to overwrite
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    return HDPOLoss(
        *LogitsHDPOLoss.apply(logits, labels, ref_logps, bounds, head_options, pair_options, inplace, needs_grad)
    )


class LogitsHDPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ref_logps, cu_seqlens, head_options, pair_options, inplace, needs_grad):
        grad = None if not needs_grad else logits if inplace else torch.empty_like(logits)
        stats = backend(logits).row_stats(
            logits,
            labels.contiguous(),
            softcap=head_options.softcap,
            logit_scale=head_options.logit_scale,
            grad_out=grad,
            overwrite=inplace,
        )
        if inplace:
            torch.autograd.graph.increment_version(logits)  # kernels do not; autograd must know that they are gone
        lengths = _scored_lengths(labels, cu_seqlens, stats.logp.dtype)
        ref_logps = None if ref_logps is None else ref_logps.to(stats.logp.dtype)
        logps = backend(stats.logp).sequence_sum(stats.logp, cu_seqlens)
        result = pair.evaluate(logps, ref_logps, lengths, pair_options)
        entropy = backend(logps).sequence_sum(stats.entropy, cu_seqlens) / lengths.clamp(min=1)
        result = result._replace(entropy=entropy)
        if needs_grad:
            a, k = pair.sequence_coefficients(len(logps) // 2, lengths, pair_options)
            slope = pair.slope(logps, ref_logps, lengths, pair_options)
            ctx.coefficients, ctx.cu_seqlens = a * slope.repeat_interleave(2) + k, cu_seqlens
        ctx.grad = grad
        ctx.mark_non_differentiable(*result[1:])
        ctx.set_materialize_grads(False)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        if d_loss is None:
            return (None,) * 8
        if ctx.grad is None:
            raise RuntimeError(_CONSUMED.format("hdpo_loss"))
        row_scale = (d_loss * ctx.coefficients)[sequence_of_row(ctx.cu_seqlens, ctx.grad.device)]
        d_logits = ctx.grad.mul_(row_scale.unsqueeze(1))
        ctx.grad = None
        return d_logits, *(None,) * 7


_CONSUMED = (
    "the gradients of {} are formed in forward and consumed by the first backward; "
    "call it again for another backward (retain_graph=True cannot keep them)"
)


def _scored_lengths(labels: Tensor, cu_seqlens: list[int], dtype: torch.dtype) -> Tensor:
    """(S,) scored tokens of each sequence."""
    scored = (labels != IGNORE_INDEX).to(dtype)
    return backend(scored).sequence_sum(scored, cu_seqlens)
