"""The loss from what is known of rows: the pair operation on all pairs at once, as an operator and for autograd."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hdpo_kernels.checks import boundaries
from hdpo_kernels.device import to_device
from hdpo_kernels.naive import IGNORE_INDEX, HDPOLoss, TokenLogp
from hdpo_kernels.ops import operator
from hdpo_kernels.pair import LossFunction, PairOptions, score
from hdpo_kernels.pairs import pair_operation
from hdpo_kernels.pairs.scored import Pairs, ScoredStats
from hdpo_kernels.parallel import Ranks
from hdpo_kernels.sequence import sequence_sum

CONSUMED = (
    "the gradients of {} are formed in forward and consumed by the first backward; "
    "call it again for another backward (retain_graph=True cannot keep them)"
)


def token_hdpo_loss(
    token: TokenLogp,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    options: PairOptions,
    sp_name: str | None,
) -> HDPOLoss:
    """Differentiable in token.logp (N,); inputs already checked, labels on any device."""
    need = torch.is_grad_enabled() and token.logp.requires_grad
    return unpack(TokenHDPOLoss.apply(*token, labels, ref_logps, cu_seqlens, options.numbers, sp_name, need))


def own_loss(
    token: TokenLogp,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    options: PairOptions,
    function: LossFunction,
) -> HDPOLoss:
    """The loss that a function of the user's makes of α-weighted log-probs, reference log-probs and lengths."""
    scored = (labels != IGNORE_INDEX).to(token.logp)
    lengths, logps = sequence_sum(scored, cu_seqlens), sequence_sum(token.logp, cu_seqlens)
    reference = torch.zeros_like(logps) if ref_logps is None else ref_logps.to(logps.dtype)
    values = score(logps, reference, lengths, options, len(logps) // 2)
    loss = function(values.alphas * logps, reference, lengths)
    if not isinstance(loss, Tensor) or loss.shape not in ((), (len(logps) // 2,)):
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_type, a function, must return a tensor of one loss a pair, ({len(logps) // 2},), or their mean, (); "
            f"got {got}"
        )
    loss = loss if not loss.dim() else loss.sum() / max(len(loss), 1)
    entropy, accuracy = (sequence_sum(x.detach(), cu_seqlens) / lengths.clamp(min=1) for x in token[1:])
    rewards = values.rewards.detach().view(-1, 2)
    chosen, rejected = rewards.unbind(1)
    return HDPOLoss(loss, logps.detach(), entropy, chosen, rejected, values.margins.detach(), accuracy)


def pairs_of(rows: ScoredStats, options: PairOptions, need: bool, sp: Ranks) -> Pairs:
    """All pairs at once."""
    return pair_operation(rows.stats).score_pairs(None, 0, len(rows.bounds) // 2, rows, options, sp, need)


def _fake_token_hdpo_loss(logp, entropy, is_top1, labels, ref_logps, cu_seqlens, *options):
    return fake_results(logp, cu_seqlens, logp.dtype, options[-1])


@operator(_fake_token_hdpo_loss)
def _token_hdpo_loss(
    logp: Tensor,
    entropy: Tensor,
    is_top1: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor,
    loss_numbers: list[float],
    sp_name: str | None,
    need: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (), logps (S,), entropy (S,), accuracy (S,), rewards (S,), margins (P,), row_scale (N,)"""
    bounds = boundaries(cu_seqlens, logp.shape[0])
    labels, cu_seqlens = to_device([labels.contiguous(), cu_seqlens.contiguous()], logp.device)
    rows = ScoredStats(torch.stack([logp, entropy, is_top1]), labels, bounds, cu_seqlens, ref_logps)
    options = PairOptions.from_numbers(loss_numbers)
    return results(pairs_of(rows, options, need, Ranks(sp_name)))


class TokenHDPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, *rest):
        *results, row_scale = _token_hdpo_loss(logp, *rest)
        ctx.save_for_backward(row_scale)
        ctx.num_inputs = 1 + len(rest)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        (row_scale,) = ctx.saved_tensors
        return None if d_loss is None else d_loss * row_scale, *(None,) * (ctx.num_inputs - 1)


def results(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What an operator returns: loss (), logps, entropy, accuracy, rewards (S,), margins (P,), row_scale (N,)."""
    return pairs.terms.sum(), *pairs[2:]


def fake_results(like: Tensor, cu_seqlens: Tensor, dtype: torch.dtype, need: bool) -> tuple[Tensor, ...]:
    num_sequences = cu_seqlens.shape[0] - 1
    sizes = (*[num_sequences] * 4, num_sequences // 2, like.shape[0] if need else 0)
    return like.new_empty((), dtype=dtype), *(like.new_empty(size, dtype=dtype) for size in sizes)


def unpack(results: tuple[Tensor, ...]) -> HDPOLoss:
    loss, logps, entropy, accuracy, rewards, margins = results
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    return HDPOLoss(loss, logps, entropy, chosen, rejected, margins, accuracy)
