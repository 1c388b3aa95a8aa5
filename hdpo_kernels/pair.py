"""The loss of a pair: the only copy of the loss maths beside the oracle's.

P pairs, S = 2P sequences, interleaved chosen, rejected. Every loss here is a function f of one number per pair,

    u_p = Σ_{s in pair p} w_s (α_s ℓ_s − ρ_s)   w = ±β (sigmoid, hinge), ±1/n_s (ipo), plus for the chosen
    L   = mean_p f(u_p) − nll_weight · mean_p ℓ_w / n_w

so the gradient that the heavy part needs is one number per sequence,

    c_s = ∂L/∂ℓ_s = a_s · f'(u_p) + k_s          a_s = α_s w_s / P,   k_s = −nll_weight / (n_s P) for chosen, else 0

with α_s = α, or by token α_s = 1 + (α − 1) n̄_p / n_s, n̄_p the mean length of the pair's two sequences. a_s and k_s
depend on lengths alone and are known before any logits are.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hdpo_kernels.checks import check_ref_logps
from hdpo_kernels.naive import HDPOLoss

LOSS_TYPES = ("sigmoid", "hinge", "ipo")
ALPHA_LEVELS = ("sequence", "token")


@dataclass(frozen=True)
class PairOptions:
    alpha: float
    beta: float
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    alpha_level: str = "sequence"

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
        if self.alpha_level not in ALPHA_LEVELS:
            raise ValueError(f"alpha_level must be one of {', '.join(ALPHA_LEVELS)}; got {self.alpha_level!r}")
        if self.alpha_level == "token" and self.loss_type == "ipo":
            raise ValueError(
                "loss_type='ipo' averages log-probabilities over tokens, so alpha weighs them by token already: "
                "leave out alpha_level='token'"
            )

    @property
    def numbers(self) -> list[float]:
        """As operators take them, which know neither dataclasses nor names of a few values; see `from_numbers`."""
        names = LOSS_TYPES.index(self.loss_type), ALPHA_LEVELS.index(self.alpha_level)
        return [self.alpha, self.beta, self.label_smoothing, self.nll_weight, *names]

    @classmethod
    def from_numbers(cls, numbers: list[float]) -> "PairOptions":
        alpha, beta, smoothing, nll_weight, loss_type, level = numbers
        return cls(alpha, beta, LOSS_TYPES[int(loss_type)], smoothing, nll_weight, ALPHA_LEVELS[int(level)])

    @property
    def needs_lengths(self) -> bool:
        return self.loss_type == "ipo" or self.nll_weight > 0 or self.alpha_level == "token"

    def gradient_unit(self, bounds: Sequence[int]) -> float:
        """A power of two that brings the coefficients a_s to about one: what is multiplied by it survives fp16.

        bounds: boundaries of the sequences.
        """
        size = self.alpha
        if self.alpha_level == "token" and len(bounds) > 1:
            # α_s of a short sequence beside a long one may be many times α: fp16 ends at 65504
            lengths = torch.tensor([float(end - start) for start, end in itertools.pairwise(bounds)], device="cpu")
            size = max(size, float(torch.as_tensor(_alphas(lengths, self)).abs().max()) / 64)
        size *= (1.0 if self.loss_type == "ipo" else self.beta) / max(len(bounds) // 2, 1)
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
    alpha_level: str = "sequence",
) -> HDPOLoss:
    """H-DPO (arXiv 2411.07595, eq. 9) and its relatives from sequence log-probabilities; differentiable in `logps`.

    logps (S,), ref_logps (S,) or None (zeros): sums over tokens, nats, sequences interleaved chosen, rejected.
    alpha: weight of the policy's log-probabilities; < 1 sharpens, 1 is DPO, > 1 diversifies. beta: strength of the
    pull to the reference. loss_type: "sigmoid", "hinge" (SLiC, arXiv 2305.10425) or "ipo" (arXiv 2310.12036, eq. 17,
    log-probabilities averaged over tokens). label_smoothing: probability of a flipped label (conservative DPO).
    nll_weight: adds that times the chosen sequences' mean negative log-likelihood per token (arXiv 2404.19733).
    lengths (S,): scored tokens of each sequence; required by "ipo", nll_weight and alpha_level="token".
    alpha_level: "sequence", the paper's; or "token", where α acts on log-probabilities per token, so that lengths that
    differ make no margin: with n_s tokens (an empty sequence counts as one) and n̄ the mean of the pair's two,

        z = β[(ℓ_w − ρ_w) − (ℓ_l − ρ_l)] + (α − 1) β n̄ (ℓ_w / n_w − ℓ_l / n_l)

    DPO at α = 1, and "sequence" where n_w = n_l. Rewards are β(α_s ℓ − ρ) with α_s = 1 + (α − 1) n̄ / n_s. "ipo" has
    log-probabilities per token anyway, and refuses it.

    Returns HDPOLoss with entropy None. Only `loss` carries a gradient.
    Raises ValueError for options out of range, an odd number of sequences, or lengths missing where needed.
    """
    options = PairOptions(alpha, beta, loss_type, label_smoothing, nll_weight, alpha_level)
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
        raise ValueError(
            "loss_type='ipo', nll_weight and alpha_level='token' need lengths, the scored tokens of each sequence"
        )
    return evaluate(logps, ref_logps, lengths, options)


class Scored(NamedTuple):
    """What the loss makes of pairs."""

    terms: Tensor  # (P,) whose sum is the loss: f(u_p) / P, and the nll term
    slope: Tensor  # (P,) f'(u_p)
    rewards: Tensor  # (S,) β(α_s ℓ − ρ)
    margins: Tensor  # (P,) chosen − rejected
    alphas: Tensor | float  # α_s, (S,) or one for all


def evaluate(logps: Tensor, ref_logps: Tensor | None, lengths: Tensor | None, options: PairOptions) -> HDPOLoss:
    """The loss and what is plotted beside it; inputs already checked."""
    scored = score(logps, ref_logps, lengths, options, logps.shape[0] // 2)
    chosen, rejected = scored.rewards.detach().view(-1, 2).unbind(1)
    return HDPOLoss(scored.terms.sum(), logps.detach(), None, chosen, rejected, scored.margins.detach())


def score(
    logps: Tensor, ref_logps: Tensor | None, lengths: Tensor | None, options: PairOptions, num_pairs: int
) -> Scored:
    """The pairs that logps (S,) are of, some or all of the `num_pairs` that the loss is a mean over."""
    num_pairs = max(num_pairs, 1)
    alphas = options.alpha if lengths is None else _alphas(lengths, options)
    scores = alphas * logps
    if ref_logps is not None:
        scores = scores - ref_logps
    rewards = options.beta * scores
    u = margins = _difference(rewards)
    if options.loss_type == "ipo":
        assert lengths is not None
        u = _difference(scores / lengths.clamp(min=1))
    value, slope = _objective(u, options)
    terms = value / num_pairs
    if options.nll_weight:
        assert lengths is not None
        terms = terms - options.nll_weight / num_pairs * (logps / lengths.clamp(min=1))[0::2]
    return Scored(terms, slope, rewards, margins, alphas)


def sequence_coefficients(
    num_pairs: int, lengths: Tensor, options: PairOptions, alphas: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """a and k, each (S,): c_s = a_s · f'(u_p) + k_s. lengths (S,) floating; alphas: those of `Scored`, if known."""
    share, alphas = 1 / max(num_pairs, 1), _alphas(lengths, options) if alphas is None else alphas
    scale = share if options.loss_type == "ipo" else options.beta * share
    a = alphas * scale if isinstance(alphas, Tensor) else torch.full_like(lengths, alphas * scale)
    if options.loss_type == "ipo":
        a = a / lengths.clamp(min=1)
    a[1::2].neg_()
    if not options.nll_weight:
        return a, torch.zeros_like(a)
    k = -options.nll_weight * share / lengths.clamp(min=1)
    k[1::2] = 0
    return a, k


def initial_margins(ref_logps: Tensor, lengths: Tensor, options: PairOptions) -> Tensor:
    """Margins (P,) of a policy that equals its reference: zero if alpha is 1. ref_logps, lengths (S,)."""
    return _difference(options.beta * (_alphas(lengths, options) - 1) * ref_logps)


def _alphas(lengths: Tensor, options: PairOptions) -> Tensor | float:
    """α_s: one number for all, or (S,)"""
    alpha = options.alpha
    if options.alpha_level == "sequence":
        return alpha
    n = lengths.clamp(min=1).view(-1, 2)
    # 1 + (α − 1) n̄/n, written so that it is exactly α where lengths are equal, and exactly 1 where α is
    return (alpha + (alpha - 1) * (n.flip(1) - n) / (2 * n)).flatten()


def _difference(values: Tensor) -> Tensor:
    """(S,) -> (P,): chosen − rejected"""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen - rejected


def _objective(u: Tensor, options: PairOptions) -> tuple[Tensor, Tensor]:
    """f(u) and f'(u), each (P,); ε the probability of a flipped label."""
    eps = options.label_smoothing
    if options.loss_type == "sigmoid":
        # ε σ(u) − (1 − ε) σ(−u) = ε − σ(−u)
        minus = -u
        return (eps - 1) * F.logsigmoid(u) - eps * F.logsigmoid(minus), eps - torch.sigmoid(minus)
    if options.loss_type == "hinge":
        value = (1 - eps) * F.relu(1 - u) + eps * F.relu(1 + u)
        return value, eps * (u > -1).to(u.dtype) - (1 - eps) * (u < 1).to(u.dtype)
    target = 1 / (2 * options.beta)
    return (1 - eps) * (u - target) ** 2 + eps * (u + target) ** 2, 2 * (u - (1 - 2 * eps) * target)
