"""The specification: the H-DPO loss in plain PyTorch, any dtype, any device. Imports nothing from the package.

    hidden, weight, labels ── linear_logp ──> logp (N,) ── sequence_sum ──> logps (S,) ── pair_loss ──> loss ()

N rows, V vocabulary, H hidden size, S = 2P sequences, P pairs; sequence 2p is the chosen one of pair p, 2p + 1 the
rejected one. "ref" is the frozen reference policy. Log-probabilities, entropies and rewards are in nats.

    z_p = β [(α ℓ_w − ρ_w) − (α ℓ_l − ρ_l)]          L = mean_p −log σ(z_p)          (H-DPO, arXiv 2411.07595, eq. 9)

It keeps all (N, V) logits: an oracle, not something to train with.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


class TokenLogp(NamedTuple):
    """What a head says of every row, in nats: zero where the row is not scored."""

    logp: Tensor  # (N,) log-probability of the label
    entropy: Tensor  # (N,) entropy of the row's distribution
    is_top1: Tensor  # (N,) 1 where no logit is larger than the label's, else 0


class HDPOLoss(NamedTuple):
    """A preference loss and what one wants to plot beside it."""

    loss: Tensor  # () mean over the pairs
    logps: Tensor  # (S,) policy log-probability of each sequence, nats
    entropy: Tensor | None  # (S,) mean nats per scored token; None where only log-probabilities were given
    chosen_rewards: Tensor  # (P,) β(αℓ − ρ): the α-weighted implicit reward, the one the loss sees
    rejected_rewards: Tensor  # (P,)
    margins: Tensor  # (P,) chosen_rewards − rejected_rewards
    accuracy: Tensor | None = None  # (S,) share of scored tokens with is_top1; None where entropy is


def linear_logp(hidden, weight, labels, *, bias=None, softcap=None, logit_scale=1.0) -> TokenLogp:
    """log softmax(softcap · tanh(logit_scale · (h Wᵀ + b) / softcap)) at the label, and its entropy, per row.

    hidden (N, H), weight (V, H), labels (N,) int64 with -100 = not scored, bias (V,). Logits are in the inputs' dtype,
    the softmax in fp32 (fp64 for fp64 inputs).
    """
    return _token_logp(F.linear(hidden, weight, bias), labels, softcap, logit_scale)


def sequence_sum(values, cu_seqlens) -> Tensor:
    """Sum of values (N,) over each sequence; cu_seqlens (S + 1,) are the sequences' boundaries. -> (S,)"""
    bounds = torch.as_tensor(cu_seqlens, device="cpu").tolist()
    sums = [values[start:end].sum() for start, end in itertools.pairwise(bounds)]
    return torch.stack(sums) if sums else values.new_zeros(0)


def pair_loss(
    logps,
    ref_logps,
    *,
    alpha,
    beta,
    loss_type="sigmoid",
    label_smoothing=0.0,
    nll_weight=0.0,
    lengths: Any = None,
    alpha_level="sequence",
    loss_weights=None,
    f_divergence_type="reverse_kl",
    f_alpha_divergence_coef=0.5,
    discopop_tau=0.05,
) -> HDPOLoss:
    """The loss of P pairs from the log-probabilities (S,) of policy and reference (None: zeros).

    loss_type: one of `LOSSES`, or several, summed with loss_weights.
    lengths (S,): scored tokens of each sequence, needed by "ipo", "sigmoid_norm", "sft", nll_weight and by token.
    label_smoothing ε: a preference label is taken to be flipped with probability ε (conservative DPO).
    nll_weight: weight of the chosen sequences' mean negative log-likelihood per token (arXiv 2404.19733).
    alpha_level "token": z = β(Δ_w − Δ_l) + (α − 1) β n̄ (ℓ_w/n_w − ℓ_l/n_l), Δ = ℓ − ρ, n̄ = (n_w + n_l)/2.
    f_divergence_type: margins are of h(αℓ − ρ), h the derivative of the divergence's f at exp(αℓ − ρ).
    """
    ref_logps = torch.zeros_like(logps) if ref_logps is None else ref_logps.to(logps.dtype)
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    n: Any = None if lengths is None else lengths.clamp(min=1).to(logps.dtype)
    if alpha_level == "sequence":
        policy = alpha * logps
    elif alpha_level == "token" and not {"ipo", "sigmoid_norm"} & set(names):
        mean_length = ((n[0::2] + n[1::2]) / 2).repeat_interleave(2)
        policy = logps + (alpha - 1) * mean_length * (logps / n)
    else:
        raise ValueError(f"alpha_level must be 'sequence', or 'token' without ipo, sigmoid_norm, not {alpha_level!r}")
    scores = policy - ref_logps
    compared = _divergence(scores, f_divergence_type, f_alpha_divergence_coef)
    eps, loss = label_smoothing, logps.new_zeros(())
    for name, weight in zip(names, loss_weights or [1.0] * len(names), strict=True):
        if name == "sft":  # a mean over tokens
            loss = loss - weight * logps[0::2].sum() / lengths[0::2].sum().clamp(min=1)
            continue
        if name not in LOSSES:
            raise ValueError(f"loss_type must be one of {', '.join((*LOSSES, 'sft'))}; not {name!r}")
        per_pair = LOSSES[name](policy, ref_logps, scores, compared, n, beta, eps, discopop_tau)
        loss = loss + weight * per_pair.sum() / max(per_pair.numel(), 1)
    if nll_weight:
        loss = loss - nll_weight * (logps[0::2] / n[0::2]).sum() / max(len(logps) // 2, 1)
    rewards = (beta * scores).detach()
    return HDPOLoss(loss, logps, None, rewards[0::2], rewards[1::2], rewards[0::2] - rewards[1::2])


def _divergence(scores, kind, coef) -> Tensor:
    if kind == "reverse_kl":  # f(t) = t log t
        return scores
    if kind == "forward_kl":  # −log t
        return 1 - 1 / scores.exp()
    if kind == "js_divergence":  # t log(2t/(t + 1)) + log(2/(t + 1))
        return math.log(2) + F.logsigmoid(scores)
    return scores if abs(coef - 1) < 1e-6 else (((coef - 1) * scores).exp() - 1) / (coef - 1)


def _of_margin(function, per_token=False, scaled=True):
    """A loss that is a function of u, β and ε."""

    def loss(policy, ref_logps, scores, compared, n, beta, eps, tau) -> Tensor:
        compared = compared / n if per_token else compared
        u = (beta if scaled else 1) * (compared[0::2] - compared[1::2])
        return function(u, beta, eps, tau)

    return loss


def _of_rewards(function):
    """A loss that is a function of both rewards."""

    def loss(policy, ref_logps, scores, compared, n, beta, eps, tau) -> Tensor:
        return function(beta * scores[0::2], beta * scores[1::2], beta)

    return loss


def _logistic(u, beta, eps, tau) -> Tensor:
    return -(1 - eps) * F.logsigmoid(u) - eps * F.logsigmoid(-u)


def _exo(u, beta, eps, tau) -> Tensor:
    won, lost = torch.sigmoid(u), torch.sigmoid(-u)
    return won * (F.logsigmoid(u) - math.log(1 - eps)) + lost * (F.logsigmoid(-u) - math.log(eps))


def _discopop(u, beta, eps, tau) -> Tensor:
    m = torch.sigmoid(u / tau)
    return -(1 - m) * F.logsigmoid(u) + torch.exp(-u) * m


def _aot(policy, ref_logps, scores, compared, n, beta, eps, tau) -> Tensor:
    ratios, references = policy[0::2] - policy[1::2], ref_logps[0::2] - ref_logps[1::2]
    return _logistic(beta * (ratios.sort().values - references.sort().values), beta, eps, tau)


def _aot_unpaired(policy, ref_logps, scores, compared, n, beta, eps, tau) -> Tensor:
    return _logistic(beta * (scores[0::2].sort().values - scores[1::2].sort().values), beta, eps, tau)


LOSSES = {
    "sigmoid": _of_margin(_logistic),
    "hinge": _of_margin(lambda u, beta, eps, tau: (1 - eps) * F.relu(1 - u) + eps * F.relu(1 + u)),
    "ipo": _of_margin(
        lambda u, beta, eps, tau: (1 - eps) * (u - 1 / (2 * beta)) ** 2 + eps * (u + 1 / (2 * beta)) ** 2, True, False
    ),
    "exo_pair": _of_margin(_exo),
    "nca_pair": _of_rewards(lambda w, r, _: -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-r)),
    "robust": _of_margin(
        lambda u, beta, eps, tau: (-(1 - eps) * F.logsigmoid(u) + eps * F.logsigmoid(-u)) / (1 - 2 * eps)
    ),
    "bco_pair": _of_rewards(lambda w, r, _: -F.logsigmoid(w) - F.logsigmoid(-r)),
    "sppo_hard": _of_rewards(lambda w, r, beta: (w / beta - 1 / (2 * beta)) ** 2 + (r / beta + 1 / (2 * beta)) ** 2),
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _of_rewards(lambda w, r, _: 1 - torch.sigmoid(w) + torch.sigmoid(r)),
    "apo_down": _of_rewards(lambda w, r, _: torch.sigmoid(w) + 1 - torch.sigmoid(w - r)),
    "discopop": _of_margin(_discopop),
    "sigmoid_norm": _of_margin(_logistic, per_token=True),
}


def hdpo_loss(logits, labels, cu_seqlens, ref_logps, *, softcap=None, logit_scale=1.0, **loss_options) -> HDPOLoss:
    """The loss from logits (N, V); loss_options: those of `pair_loss` but lengths (default: alpha 1, beta 0.1)."""
    token = _token_logp(logits, labels, softcap, logit_scale)
    lengths = sequence_sum((labels != IGNORE_INDEX).to(token.logp.dtype), cu_seqlens)
    entropy, accuracy = (sequence_sum(x, cu_seqlens) / lengths.clamp(min=1) for x in (token.entropy, token.is_top1))
    options = {"alpha": 1.0, "beta": 0.1, **loss_options}
    result = pair_loss(sequence_sum(token.logp, cu_seqlens), ref_logps, lengths=lengths, **options)
    return result._replace(entropy=entropy, accuracy=accuracy)


def linear_hdpo_loss(
    hidden, weight, labels, cu_seqlens, ref_logps, *, bias=None, softcap=None, logit_scale=1.0, **loss_options
) -> HDPOLoss:
    """The loss from hidden states (N, H) and the head's weight (V, H); loss_options as in `hdpo_loss`."""
    logits = F.linear(hidden, weight, bias)
    return hdpo_loss(logits, labels, cu_seqlens, ref_logps, softcap=softcap, logit_scale=logit_scale, **loss_options)


def _token_logp(logits, labels, softcap, logit_scale) -> TokenLogp:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    scored = labels != IGNORE_INDEX
    log_p = torch.log_softmax(z, dim=-1)
    y = labels.masked_fill(~scored, 0).unsqueeze(-1)
    logp = log_p.gather(-1, y).squeeze(-1)
    # of logits: log-probs are rounded, and may be equal where those are not. A NaN is no likeliest token.
    is_top1 = (z.gather(-1, y) == z.amax(-1, keepdim=True)).squeeze(-1) & ~logp.isnan() & scored
    # p log p → 0 where p = 0, which also keeps a logit of −inf (a vocabulary entry switched off) from making NaN
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    return TokenLogp(torch.where(scored, logp, 0), torch.where(scored, entropy, 0), is_top1.to(z.dtype))
