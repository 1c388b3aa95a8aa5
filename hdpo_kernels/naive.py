"""The specification: the H-DPO loss in plain PyTorch, any dtype, any device. Imports nothing from the package.

    hidden, weight, labels ── linear_logp ──> logp (N,) ── sequence_sum ──> logps (S,) ── pair_loss ──> loss ()

N rows, V vocabulary, H hidden size, S = 2P sequences, P pairs; sequence 2p is the chosen one of pair p, 2p + 1 the
rejected one. "ref" is the frozen reference policy. Log-probabilities, entropies and rewards are in nats.

    z_p = β [(α ℓ_w − ρ_w) − (α ℓ_l − ρ_l)]          L = mean_p −log σ(z_p)          (H-DPO, arXiv 2411.07595, eq. 9)

It keeps all (N, V) logits: an oracle, not something to train with.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


class TokenLogp(NamedTuple):
    """What a head says of every row, in nats: zero where the row is not scored."""

    logp: Tensor  # (N,) log-probability of the label
    entropy: Tensor  # (N,) entropy of the row's distribution


class HDPOLoss(NamedTuple):
    """A preference loss and what one wants to plot beside it."""

    loss: Tensor  # () mean over the pairs
    logps: Tensor  # (S,) policy log-probability of each sequence, nats
    entropy: Tensor | None  # (S,) mean nats per scored token; None where only log-probabilities were given
    chosen_rewards: Tensor  # (P,) β(αℓ − ρ): the α-weighted implicit reward, the one the loss sees
    rejected_rewards: Tensor  # (P,)
    margins: Tensor  # (P,) chosen_rewards − rejected_rewards


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
    lengths=None,
    alpha_level="sequence",
) -> HDPOLoss:
    """The loss of P pairs from the log-probabilities (S,) of policy and reference (None: zeros).

    lengths (S,): scored tokens of each sequence, needed by "ipo", nll_weight and alpha_level "token".
    label_smoothing ε: a preference label is taken to be flipped with probability ε (conservative DPO).
    nll_weight: weight of the chosen sequences' mean negative log-likelihood per token (arXiv 2404.19733).
    alpha_level "token": z = β(Δ_w − Δ_l) + (α − 1) β n̄ (ℓ_w/n_w − ℓ_l/n_l), Δ = ℓ − ρ, n̄ = (n_w + n_l)/2.
    """
    ref_logps = torch.zeros_like(logps) if ref_logps is None else ref_logps
    if alpha_level == "sequence":
        scores = alpha * logps - ref_logps
    elif alpha_level == "token" and loss_type != "ipo":
        n = lengths.clamp(min=1).to(logps.dtype)
        mean_length = ((n[0::2] + n[1::2]) / 2).repeat_interleave(2)
        scores = (logps - ref_logps) + (alpha - 1) * mean_length * (logps / n)
    else:
        raise ValueError(f"alpha_level must be 'sequence', or 'token' without 'ipo', not {alpha_level!r}")
    chosen, rejected = scores[0::2], scores[1::2]
    if loss_type == "sigmoid":
        z = beta * (chosen - rejected)
        losses = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    elif loss_type == "hinge":
        z = beta * (chosen - rejected)
        losses = (1 - label_smoothing) * F.relu(1 - z) + label_smoothing * F.relu(1 + z)
    elif loss_type == "ipo":
        n = lengths.clamp(min=1)
        h, target = chosen / n[0::2] - rejected / n[1::2], 1 / (2 * beta)
        losses = (1 - label_smoothing) * (h - target) ** 2 + label_smoothing * (h + target) ** 2
    else:
        raise ValueError(f"loss_type must be 'sigmoid', 'hinge' or 'ipo', not {loss_type!r}")
    if nll_weight:
        losses = losses - nll_weight * logps[0::2] / lengths[0::2].clamp(min=1)
    loss = losses.sum() / max(losses.numel(), 1)
    rewards = (beta * scores).detach()
    return HDPOLoss(loss, logps, None, rewards[0::2], rewards[1::2], rewards[0::2] - rewards[1::2])


def hdpo_loss(
    logits, labels, cu_seqlens, ref_logps, *, alpha=1.0, beta=0.1, loss_type="sigmoid", label_smoothing=0.0,
    nll_weight=0.0, softcap=None, logit_scale=1.0, alpha_level="sequence",
) -> HDPOLoss:  # fmt: skip
    """The loss from logits (N, V)."""
    token = _token_logp(logits, labels, softcap, logit_scale)
    lengths = sequence_sum((labels != IGNORE_INDEX).to(token.logp.dtype), cu_seqlens)
    entropy = sequence_sum(token.entropy, cu_seqlens) / lengths.clamp(min=1)
    result = pair_loss(
        sequence_sum(token.logp, cu_seqlens),
        ref_logps,
        alpha=alpha,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        nll_weight=nll_weight,
        lengths=lengths,
        alpha_level=alpha_level,
    )
    return result._replace(entropy=entropy)


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
    logp = log_p.gather(-1, labels.masked_fill(~scored, 0).unsqueeze(-1)).squeeze(-1)
    # p log p → 0 where p = 0, which also keeps a logit of −inf (a vocabulary entry switched off) from making NaN
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    return TokenLogp(torch.where(scored, logp, 0), torch.where(scored, entropy, 0))
