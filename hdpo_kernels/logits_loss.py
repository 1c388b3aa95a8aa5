"""The H-DPO loss from logits: statistics and gradient of rows, the pair operation, a sum.

N rows, V vocabulary, S = 2P sequences interleaved chosen, rejected.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hdpo_kernels.checks import as_boundaries, boundaries, check_label_values, check_labels, check_ref_logps
from hdpo_kernels.device import on_device, to_device
from hdpo_kernels.lm_head import HeadOptions, full_precision
from hdpo_kernels.logp import needs_grad
from hdpo_kernels.naive import HDPOLoss, TokenLogp
from hdpo_kernels.ops import operator
from hdpo_kernels.pair import PairOptions
from hdpo_kernels.pairs.loss import CONSUMED, fake_results, pairs_of, results, unpack
from hdpo_kernels.pairs.scored import ScoredStats
from hdpo_kernels.parallel import Ranks
from hdpo_kernels.rows import backend


def hdpo_loss(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    ref_logps: Tensor | None,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    alpha_level: str = "sequence",
    loss_weights: Sequence[float] | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
) -> HDPOLoss:
    """The same loss from logits; other arguments and result are those of `linear_hdpo_loss`.

    Args:
        logits: (N, V) of any floating dtype.
        labels, cu_seqlens, ref_logps: as there.
        loss_type: one of `pair.LOSS_TYPES`, or several.
        inplace: overwrite the logits with their gradient, so that no second (N, V) tensor exists. Allowed where nothing
            else reads them: a leaf that requires grad is refused; autograd raises if an earlier operation saved them.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, boundaries, labels or options that do not fit.
    """
    HeadOptions(softcap, logit_scale)  # checks them
    pair_options = PairOptions(
        alpha, beta, loss_type, label_smoothing, nll_weight, alpha_level,
        loss_weights, f_divergence_type, f_alpha_divergence_coef, discopop_tau,
    )  # fmt: skip
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating of shape (N, V), got {logits.dtype} {tuple(logits.shape)}")
    base = logits if logits._base is None else logits._base
    if inplace and base.is_leaf and base.requires_grad:
        raise ValueError("inplace=True would overwrite a leaf that requires grad, or a view of one; pass inplace=False")
    if inplace and logits.stride(1) != 1:
        raise ValueError(f"inplace=True needs rows without gaps, got strides {logits.stride()}; pass inplace=False")
    check_labels(labels, logits.shape[0], logits.device)
    cu_seqlens = as_boundaries(cu_seqlens, pairs=True)
    check_ref_logps(ref_logps, cu_seqlens.shape[0] - 1, logits.device)
    if logits.stride(1) != 1:
        logits, inplace = logits.contiguous(), True  # row operations walk along rows; the copy is ours to overwrite
    inplace = inplace and not torch.compiler.is_compiling()  # a compiled graph's memory is the compiler's
    options = (softcap, logit_scale, pair_options.numbers, *needs_grad(logits))
    return unpack(LogitsHDPOLoss.apply(logits, labels, ref_logps, cu_seqlens, inplace, *options))


def _fake_hdpo_loss(logits, labels, ref_logps, cu_seqlens, *options):
    need = options[-1]
    results = fake_results(logits, cu_seqlens, full_precision(logits.dtype), need)
    return *results, torch.empty_like(logits) if need else logits.new_empty(0)


@operator(_fake_hdpo_loss)
def _hdpo_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor,
    softcap: float | None,
    logit_scale: float,
    loss_numbers: list[float],
    need: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (), logps, entropy, accuracy, rewards (S,), margins (P,), row_scale (N,), d_logits (N, V) without it"""
    grad = torch.empty_like(logits) if need else logits.new_empty(0)
    options = PairOptions.from_numbers(loss_numbers)
    return *_from_logits(logits, labels, ref_logps, cu_seqlens, softcap, logit_scale, options, grad), grad


def _from_logits(
    logits: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor,
    softcap: float | None,
    logit_scale: float,
    options: PairOptions,
    grad: Tensor,  # (N, V) receives ∂logp/∂logits, may be the logits; empty: not wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    all_scored = check_label_values(labels, logits.shape[1])
    bounds = boundaries(cu_seqlens, logits.shape[0])
    labels, cu_seqlens = to_device([labels.contiguous(), cu_seqlens.contiguous()], logits.device)
    need, inplace = grad.shape == logits.shape, grad is logits
    stats = torch.empty(3, len(labels), dtype=full_precision(logits.dtype), device=logits.device)
    backend(stats).row_stats(
        logits,
        labels,
        out=TokenLogp(*stats),
        all_scored=all_scored,
        softcap=softcap,
        logit_scale=logit_scale,
        grad_out=grad if need else None,
        overwrite=inplace,
    )
    rows = ScoredStats(stats, labels, bounds, cu_seqlens, ref_logps, all_scored)
    return results(pairs_of(rows, options, need, Ranks(None)))


class LogitsHDPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ref_logps, cu_seqlens, inplace, *options):
        inputs = (logits, labels, ref_logps, cu_seqlens)
        if inplace:
            softcap, logit_scale, loss_numbers, need = options
            pair_options = PairOptions.from_numbers(loss_numbers)
            grad = logits if need else logits.new_empty(0)
            with on_device(logits.device):
                *results, row_scale = _from_logits(*inputs, softcap, logit_scale, pair_options, grad)
            torch.autograd.graph.increment_version(logits)  # kernels do not; autograd must know that they are gone
        else:
            *results, row_scale, grad = _hdpo_loss(*inputs, *options)
        ctx.grad, ctx.row_scale, ctx.num_inputs = grad, row_scale, 5 + len(options)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        none = (None,) * (ctx.num_inputs - 1)
        if d_loss is None:
            return None, *none
        if ctx.grad is None:
            raise RuntimeError(CONSUMED.format("hdpo_loss"))
        with on_device(d_loss.device):
            d_logits = backend(ctx.row_scale).scale_rows(ctx.grad, ctx.row_scale, factor=d_loss, inplace=True)
        ctx.grad = None
        return d_logits, *none
