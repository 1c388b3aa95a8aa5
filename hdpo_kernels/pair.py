"""The loss of a pair: the only copy of the loss maths beside the oracle's.

P pairs, S = 2P sequences, interleaved chosen, rejected. Every loss here is a function f of one number per pair,

    u_p = Σ_{s in pair p} w_s (α ℓ_s − ρ_s)   w = ±β (sigmoid, hinge), ±1/n_s (ipo), plus for the chosen
    L   = mean_p f(u_p) − nll_weight · mean_p ℓ_w / n_w

so the gradient that the heavy part needs is one number per sequence,

    c_s = ∂L/∂ℓ_s = a_s · f'(u_p) + k_s          a_s = α w_s / P,   k_s = −nll_weight / (n_s P) for chosen, else 0

in which a_s and k_s depend on lengths alone and are known before any logits are.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hdpo_kernels.checks import check_ref_logps
from hdpo_kernels.naive import HDPOLoss

LOSS_TYPES = ("sigmoid", "hinge", "ipo")


@dataclass(frozen=True)
class PairOptions:
    alpha: float
    beta: float
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value}")
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}; got {self.loss_type!r}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing is the probability that a label is flipped, in [0, 0.5); got {self.label_smoothing}"
            )
        if not 0 <= self.nll_weight < math.inf:
            raise ValueError(f"nll_weight must be zero or positive, got {self.nll_weight}")

    @property
    def numbers(self) -> list[float]:
        """As operators take them, which know neither dataclasses nor names of a few values; see `from_numbers`."""
        return [self.alpha, self.beta, LOSS_TYPES.index(self.loss_type), self.label_smoothing, self.nll_weight]

    @classmethod
    def from_numbers(cls, numbers: list[float]) -> "PairOptions":
        alpha, beta, loss_type, *rest = numbers
        return cls(alpha, beta, LOSS_TYPES[int(loss_type)], *rest)

    @property
    def needs_lengths(self) -> bool:
        return self.loss_type == "ipo" or self.nll_weight > 0

    def gradient_unit(self, num_pairs: int) -> float:
        """A power of two that brings the coefficients a_s to about one: what is multiplied by it survives fp16."""
        size = self.alpha / max(num_pairs, 1) * (1.0 if self.loss_type == "ipo" else self.beta)
        return 2.0 ** -round(math.log2(size))


def pair_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    *,
    alpha: float,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    lengths: Tensor | None = None,
) -> HDPOLoss:
    """H-DPO (arXiv 2411.07595, eq. 9) and its relatives from sequence log-probabilities; differentiable in `logps`.

    logps (S,), ref_logps (S,) or None (zeros): sums over tokens, nats, sequences interleaved chosen, rejected.
    alpha: weight of the policy's log-probabilities; < 1 sharpens, 1 is DPO, > 1 diversifies. beta: strength of the
    pull to the reference. loss_type: "sigmoid", "hinge" (SLiC, arXiv 2305.10425) or "ipo" (arXiv 2310.12036, eq. 17,
    log-probabilities averaged over tokens). label_smoothing: probability of a flipped label (conservative DPO).
    nll_weight: adds that times the chosen sequences' mean negative log-likelihood per token (arXiv 2404.19733).
    lengths (S,): scored tokens of each sequence; required by "ipo" and nll_weight.

    Returns HDPOLoss with entropy None. Only `loss` carries a gradient.
    Raises ValueError for options out of range, an odd number of sequences, or lengths missing where needed.
    """
    options = PairOptions(alpha, beta, loss_type, label_smoothing, nll_weight)
    if logps.dim() != 1 or logps.shape[0] % 2:
        raise ValueError(f"logps must have shape (S,), S even (chosen and rejected in turn), got {tuple(logps.shape)}")
    check_ref_logps(ref_logps, logps.shape[0], logps.device)
    if lengths is not None:
        if lengths.shape != logps.shape:
            raise ValueError(
                f"lengths must have one entry a sequence, {tuple(logps.shape)}, got {tuple(lengths.shape)}"
            )
        lengths = lengths.to(logps.dtype)
    if options.needs_lengths and lengths is None:
        raise ValueError("loss_type='ipo' and nll_weight need lengths, the scored tokens of each sequence")
    return evaluate(logps, ref_logps, lengths, options)


class Scored(NamedTuple):
    """What the loss makes of pairs."""

    terms: Tensor  # (P,) whose sum is the loss: f(u_p) / P, and the nll term
    slope: Tensor  # (P,) f'(u_p)
    rewards: Tensor  # (S,) β(αℓ − ρ)
    weights: Tensor  # (S,) w


def evaluate(logps: Tensor, ref_logps: Tensor | None, lengths: Tensor | None, options: PairOptions) -> HDPOLoss:
    """The loss and what is plotted beside it; inputs already checked."""
    terms, _, rewards, _ = score(logps, ref_logps, lengths, options, logps.shape[0] // 2)
    chosen, rejected = rewards.detach().view(-1, 2).unbind(1)
    return HDPOLoss(terms.sum(), logps.detach(), None, chosen, rejected, chosen - rejected)


def score(
    logps: Tensor, ref_logps: Tensor | None, lengths: Tensor | None, options: PairOptions, num_pairs: int
) -> Scored:
    """The pairs that logps (S,) are of, some or all of the `num_pairs` that the loss is a mean over."""
    num_pairs = max(num_pairs, 1)
    scores = options.alpha * logps
    if ref_logps is not None:
        scores = scores - ref_logps
    weights = _weights(logps.detach() if lengths is None else lengths, options)
    value, slope = _objective((weights * scores).view(-1, 2).sum(1), options)
    terms = value / num_pairs
    if options.nll_weight:
        assert lengths is not None
        terms = terms - options.nll_weight / num_pairs * (logps / lengths.clamp(min=1))[0::2]
    return Scored(terms, slope, options.beta * scores, weights)


def sequence_coefficients(
    num_pairs: int, lengths: Tensor, options: PairOptions, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """a and k, each (S,): c_s = a_s · f'(u_p) + k_s. weights: those of `Scored`, where they are known."""
    a = options.alpha / max(num_pairs, 1) * (_weights(lengths, options) if weights is None else weights)
    if not options.nll_weight:
        return a, torch.zeros_like(a)
    k = -options.nll_weight / max(num_pairs, 1) / lengths.clamp(min=1)
    k[1::2] = 0
    return a, k


def _weights(like: Tensor, options: PairOptions) -> Tensor:
    """w (S,)"""
    w = 1 / like.clamp(min=1) if options.loss_type == "ipo" else torch.full_like(like, options.beta)
    w[1::2].neg_()
    return w


def _objective(u: Tensor, options: PairOptions) -> tuple[Tensor, Tensor]:
    """f(u) and f'(u), each (P,); ε the probability of a flipped label."""
    eps = options.label_smoothing
    if options.loss_type == "sigmoid":
        # ε σ(u) − (1 − ε) σ(−u) = ε − σ(−u)
        return -(1 - eps) * F.logsigmoid(u) - eps * F.logsigmoid(-u), torch.sigmoid(-u).neg() + eps
    if options.loss_type == "hinge":
        value = (1 - eps) * F.relu(1 - u) + eps * F.relu(1 + u)
        return value, eps * (u > -1).to(u.dtype) - (1 - eps) * (u < 1).to(u.dtype)
    target = 1 / (2 * options.beta)
    return (1 - eps) * (u - target) ** 2 + eps * (u + target) ** 2, 2 * (u - (1 - 2 * eps) * target)
