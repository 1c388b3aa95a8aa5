"""The loss of a pair from log-probs: options, the value with what the heavy part needs of it, and what is logged.

P pairs, S = 2P sequences, interleaved chosen, rejected. Most losses are a function f of one number per pair,

    u_p = Σ_{s in pair p} w_s (α_s ℓ_s − ρ_s)   w = ±β, or ±1/n_s (ipo), ±β/n_s (sigmoid_norm), plus for the chosen
    L   = mean_p f(u_p) − nll_weight · mean_p ℓ_w / n_w

so the gradient that the heavy part needs is one number per sequence,

    c_s = ∂L/∂ℓ_s = a_s · f'(u_p) + k_s          a_s = α_s w_s / P,   k_s = −nll_weight / (n_s P) for chosen, else 0

with α_s = α, or by token α_s = 1 + (α − 1) n̄_p / n_s, n̄_p the mean length of the pair's two sequences. a_s and k_s
depend on lengths alone and are known before any logits are. Other losses (`objectives.py`) have a derivative of their
own for each sequence, c_s = α_s ∂F/∂v_s / P + k_s, which is known when their pair is, or when all pairs are.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hdpo_kernels.checks import check_ref_logps
from hdpo_kernels.naive import HDPOLoss
from hdpo_kernels.objectives import ALL, NONE, OBJECTIVES, ONE, TWO, Objective

LOSS_TYPES = tuple(OBJECTIVES)
ALPHA_LEVELS = ("sequence", "token")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PairOptions:
    """Options of the loss; see `pair_loss`. Raises ValueError for values out of range, or that do not go together."""

    alpha: float
    beta: float
    loss_type: str | Sequence[str] = "sigmoid"
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    alpha_level: str = "sequence"
    loss_weights: Sequence[float] | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        if callable(self.loss_type):
            raise ValueError("a loss_type that is a function needs log-probs of every token: use linear_hdpo_loss")
        if not isinstance(self.loss_type, str):  # in one form, which can be compared and remembered
            names = tuple(self.loss_type)
            object.__setattr__(self, "loss_type", names[0] if len(names) == 1 else names)
        for name in ("alpha", "beta", "discopop_tau"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing is the probability that a label is flipped, in [0, 0.5); got {self.label_smoothing}"
            )
        if not 0 <= self.nll_weight < math.inf:
            raise ValueError(f"nll_weight must be zero or positive, got {self.nll_weight}")
        self._check_losses()
        if self.alpha_level not in ALPHA_LEVELS:
            raise ValueError(f"alpha_level must be one of {', '.join(ALPHA_LEVELS)}; got {self.alpha_level!r}")
        if self.alpha_level == "token" and (by_token := [name for name in self.names if OBJECTIVES[name].per_token]):
            raise ValueError(
                f"loss_type='{by_token[0]}' averages log-probabilities over tokens, so alpha weighs them by token "
                "already: leave out alpha_level='token'"
            )
        if self.f_divergence_type not in DIVERGENCES:
            raise ValueError(
                f"f_divergence_type must be one of {', '.join(DIVERGENCES)}; got {self.f_divergence_type!r}"
            )
        if not -math.inf < self.f_alpha_divergence_coef < math.inf:
            raise ValueError(f"f_alpha_divergence_coef must be a finite number, got {self.f_alpha_divergence_coef}")
        if "discopop" not in self.names:
            self._refuse(["discopop_tau"], "without loss_type='discopop'")
        if self.f_divergence_type != "alpha_divergence":
            self._refuse(["f_alpha_divergence_coef"], "without f_divergence_type='alpha_divergence'")
        if self.f_divergence_type != "reverse_kl" and (
            others := [name for name in self.names if OBJECTIVES[name].of not in (ONE, NONE)]
        ):
            raise ValueError(
                f"f_divergence_type={self.f_divergence_type!r} is defined for losses of a margin, and {others[0]} is "
                "none: leave it out"
            )

    def _refuse(self, names: Sequence[str], where: str) -> None:
        for name in names:
            if (value := getattr(self, name)) != getattr(PairOptions, name):
                raise ValueError(f"{name}={value!r} has no effect {where}: leave it out")

    def check_own_loss(self) -> None:
        """Raises ValueError for options that a loss_type which is a function of the user's does not see."""
        seen = ("alpha", "beta", "loss_type", "alpha_level")
        unseen = [each.name for each in fields(self) if each.name not in seen]
        self._refuse(unseen, "on a loss_type that is a function of your own")

    def _check_losses(self) -> None:
        names = self.names
        if not names:
            raise ValueError("loss_type is empty: name at least one loss")
        for name in names:
            if name not in OBJECTIVES:
                raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}; got {name!r}")
        if self.loss_weights is not None:
            weights = list(self.loss_weights)
            if len(weights) != len(names):
                raise ValueError(
                    f"loss_weights needs a weight for each loss: {len(names)} ({', '.join(names)}), got {weights}"
                )
            if bad := [weight for weight in weights if not 0 < weight < math.inf]:
                raise ValueError(f"loss_weights must be positive numbers, got {bad[0]}")
            object.__setattr__(self, "loss_weights", None if set(weights) == {1.0} else tuple(map(float, weights)))
        smoothing = {OBJECTIVES[name].smoothing for name in names}
        if self.label_smoothing and smoothing == {"no"}:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} has no effect on {', '.join(names)}: leave it out"
            )
        if not self.label_smoothing and "needed" in smoothing:
            raise ValueError("loss_type='exo_pair' needs label_smoothing > 0, whose logarithm it takes; 0.001 is usual")

    @property
    def losses(self) -> list[tuple[Objective, float]]:
        """Each loss with its weight."""
        names = self.names
        weights = self.loss_weights or (1.0,) * len(names)
        return [(OBJECTIVES[name], weight) for name, weight in zip(names, weights, strict=True)]

    @property
    def kind(self) -> str:
        """What the sum of the losses is a function of: ONE number a pair, TWO, or ALL pairs."""
        return kind_of(self.names, self.f_divergence_type)

    @property
    def adds_likelihood(self) -> bool:
        """Whether chosen sequences have a share of the gradient whatever their margin (k_s)."""
        return self.nll_weight > 0 or any(loss.of == NONE for loss, _ in self.losses)

    @property
    def per_token(self) -> bool:
        """Whether a loss compares log-probs per token."""
        return any(loss.per_token for loss, _ in self.losses)

    @property
    def way(self) -> str:
        """How the head computes it, in words."""
        if self.kind == ALL:
            return "log-probs of all pairs first, logits once more in backward: 4 GEMMs"
        buffer = "; a pair longer than a chunk takes one more buffer of d_weight's size"
        return "one pass, 3 GEMMs" + buffer * (self.kind == TWO or self.adds_likelihood)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def numbers(self) -> list[float]:
        """As operators take them, which know neither dataclasses nor names of a few values; see `from_numbers`."""
        names = ALPHA_LEVELS.index(self.alpha_level), DIVERGENCES.index(self.f_divergence_type)
        tuned = [self.f_alpha_divergence_coef, self.discopop_tau]
        weights = self.loss_weights or (1.0,) * len(self.names)
        losses = [n for name, weight in zip(self.names, weights, strict=True) for n in (LOSS_TYPES.index(name), weight)]
        return [self.alpha, self.beta, self.label_smoothing, self.nll_weight, *names, *tuned, *losses]

    @classmethod
    def from_numbers(cls, numbers: list[float]) -> "PairOptions":
        return _from_numbers(tuple(numbers))

    @property
    def needs_lengths(self) -> bool:
        return self.per_token or self.adds_likelihood or self.alpha_level == "token"

    def gradient_unit(self, bounds: Sequence[int]) -> float:
        """A power of two that brings the coefficients a_s to about one: what is multiplied by it survives fp16.

        bounds: boundaries of the sequences.
        """
        size = self.alpha
        if self.alpha_level == "token" and len(bounds) > 1:
            # α_s of a short sequence beside a long one may be many times α: fp16 ends at 65504
            lengths = torch.tensor([float(end - start) for start, end in itertools.pairwise(bounds)], device="cpu")
            size = max(size, float(torch.as_tensor(_alphas(lengths, self)).abs().max()) / 64)
        size *= (self.beta if any(loss.beta for loss, _ in self.losses) else 1.0) / max(len(bounds) // 2, 1)
        if self.kind == TWO:
            size *= self._slope_at_zero()
        return 2.0 ** -round(math.log2(size))

    def _slope_at_zero(self) -> float:
        """The largest derivative of a loss at rewards of zero, at least 1: sppo_hard's is 1/β²."""
        largest, zero = 1.0, torch.zeros((), device="cpu")
        for loss, weight in self.losses:
            if loss.f is not None:
                _, *slopes = loss.f(*[zero] * (1 if loss.of == ONE else 2), self)
                largest = max(largest, *(weight * abs(float(slope)) for slope in slopes))
        return largest


@functools.lru_cache(maxsize=64)
def _from_numbers(numbers: tuple[float, ...]) -> PairOptions:
    alpha, beta, smoothing, nll_weight, level, divergence, coef, tau, *losses = numbers
    names = tuple(LOSS_TYPES[int(index)] for index in losses[0::2])
    return PairOptions(
        alpha, beta, names, smoothing, nll_weight, ALPHA_LEVELS[int(level)],
        tuple(losses[1::2]), DIVERGENCES[int(divergence)], coef, tau,
    )  # fmt: skip


def kind_of(names: Sequence[str], divergence: str = "reverse_kl") -> str:
    """What the sum of the losses is a function of: ONE number a pair, TWO, or ALL pairs."""
    losses = [OBJECTIVES[name] for name in names]
    of = {loss.of for loss in losses}
    if ALL in of:
        return ALL
    if TWO in of or divergence != "reverse_kl":
        return TWO
    return ONE if len({(loss.per_token, loss.beta) for loss in losses if loss.of == ONE}) < 2 else TWO


def pair_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    *,
    alpha: float,
    beta: float,
    loss_type: str | Sequence[str] = "sigmoid",
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    lengths: Tensor | None = None,
    alpha_level: str = "sequence",
    loss_weights: Sequence[float] | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
) -> HDPOLoss:
    """H-DPO (arXiv 2411.07595, eq. 9) and its relatives from sequence log-probabilities; differentiable in `logps`.

    Args:
        logps: (S,) of the policy, sums over tokens, nats, sequences interleaved chosen, rejected.
        ref_logps: (S,) of the reference; None: zeros.
        alpha: weight of the policy's log-probabilities; < 1 sharpens, 1 is DPO, > 1 diversifies.
        beta: strength of the pull to the reference.
        loss_type: one of LOSS_TYPES (`objectives.py` has each equation with its source), or several, whose sum,
            weighted by loss_weights, is the loss.
        label_smoothing: probability in [0, 0.5) that a preference label is flipped, for losses that have it.
        nll_weight: adds that times the chosen sequences' mean negative log-likelihood per token (arXiv 2404.19733).
        lengths: (S,) scored tokens of each sequence; required by "ipo", "sigmoid_norm", "sft", nll_weight and
            alpha_level="token". An empty sequence counts as one token.
        alpha_level: "sequence", the paper's; or "token", where α acts on log-probabilities per token, so that lengths
            that differ make no margin: with n_s tokens and n̄ the mean of the pair's two,

                z = β[(ℓ_w − ρ_w) − (ℓ_l − ρ_l)] + (α − 1) β n̄ (ℓ_w / n_w − ℓ_l / n_l)

            DPO at α = 1, and "sequence" where n_w = n_l. Rewards are β(α_s ℓ − ρ) with α_s = 1 + (α − 1) n̄ / n_s.
            Losses that have log-probabilities per token anyway ("ipo", "sigmoid_norm") refuse it.
        loss_weights: a weight for each of several losses; default: 1 each.
        f_divergence_type: margins of h(v) in place of v = αℓ − ρ (arXiv 2309.16240): "forward_kl" h(v) = 1 − exp(−v),
            "js_divergence" log 2 + log σ(v), "alpha_divergence" (exp((c − 1) v) − 1)/(c − 1).
        f_alpha_divergence_coef: c of "alpha_divergence".
        discopop_tau: temperature of the loss "discopop".

    Returns:
        HDPOLoss with entropy and accuracy None. Only `loss` carries a gradient.

    Raises:
        ValueError: options out of range, an odd number of sequences, or lengths missing where needed.
    """
    options = PairOptions(
        alpha, beta, loss_type, label_smoothing, nll_weight, alpha_level,
        loss_weights, f_divergence_type, f_alpha_divergence_coef, discopop_tau,
    )  # fmt: skip
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
            "losses per token (ipo, sigmoid_norm, sft), nll_weight and alpha_level='token' need lengths, the scored "
            "tokens of each sequence"
        )
    return evaluate(logps, ref_logps, lengths, options)


class Scored(NamedTuple):
    """What the loss makes of pairs."""

    terms: Tensor  # (P,) whose sum is the loss: f(u_p) / P, and the shares of the likelihood
    slope: Tensor  # (P,) f'(u_p) of a loss of one number; else zero
    rewards: Tensor  # (S,) β(α_s ℓ − ρ)
    margins: Tensor  # (P,) chosen − rejected
    alphas: Tensor | float  # α_s, (S,) or one for all
    by_sequence: Tensor | None  # (S,) ∂F/∂v of a loss that is none of one number


def evaluate(logps: Tensor, ref_logps: Tensor | None, lengths: Tensor | None, options: PairOptions) -> HDPOLoss:
    """The loss and what is plotted beside it; inputs already checked."""
    scored = score(logps, ref_logps, lengths, options, logps.shape[0] // 2)
    chosen, rejected = scored.rewards.detach().view(-1, 2).unbind(1)
    return HDPOLoss(scored.terms.sum(), logps.detach(), None, chosen, rejected, scored.margins.detach())


def score(
    logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor | None,
    options: PairOptions,
    num_pairs: int,
    chosen_tokens: Tensor | None = None,
) -> Scored:
    """The pairs that logps (S,) are of, some or all of the `num_pairs` that the loss is a mean over.

    chosen_tokens: () tokens of all chosen sequences; default: those of these.
    """
    num_pairs = max(num_pairs, 1)
    alphas = options.alpha if lengths is None else _alphas(lengths, options)
    policy = scores = alphas * logps
    if ref_logps is not None:
        scores = policy - ref_logps
    rewards = options.beta * scores
    margins = _difference(rewards)
    by_sequence = None
    if options.kind == ONE:
        value, slope = _of_one_number(scores, margins, lengths, options)
    else:
        value, by_sequence = _of_sequences(policy, ref_logps, scores, rewards, lengths, options)
        slope = torch.zeros_like(value)
    terms = value / num_pairs
    if options.adds_likelihood:
        assert lengths is not None
        terms = terms + (_likelihood(lengths, options, num_pairs, chosen_tokens) * logps)[0::2]
    return Scored(terms, slope, rewards, margins, alphas, by_sequence)


def _of_one_number(
    scores: Tensor, margins: Tensor, lengths: Tensor | None, options: PairOptions
) -> tuple[Tensor, Tensor]:
    """f(u) and f'(u), (P,) each."""
    found = [(loss, weight) for loss, weight in options.losses if loss.of == ONE]
    if not found:
        return torch.zeros_like(margins), torch.zeros_like(margins)
    u = margins
    if found[0][0].per_token:
        assert lengths is not None
        u = _difference(scores / lengths.clamp(min=1)) * (options.beta if found[0][0].beta else 1.0)
    parts = [(loss.f(u, options), weight) for loss, weight in found]  # type: ignore[misc]
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    values, slopes = zip(*([weight * each for each in part] for part, weight in parts), strict=True)
    return sum(values[1:], values[0]), sum(slopes[1:], slopes[0])


def _of_sequences(
    policy: Tensor,
    ref_logps: Tensor | None,
    scores: Tensor,
    rewards: Tensor,
    lengths: Tensor | None,
    options: PairOptions,
) -> tuple[Tensor, Tensor]:
    """The loss of each pair (P,), and its derivative in the score v of each sequence (S,)."""
    transformed, derivative = _divergence(scores, options)
    total, by_sequence = torch.zeros_like(scores[0::2]), torch.zeros_like(scores)
    for loss, weight in options.losses:
        if loss.f is None:
            continue
        if loss.of == ONE:
            per = torch.full_like(scores, options.beta if loss.beta else 1.0)
            if loss.per_token:
                assert lengths is not None
                per = per / lengths.clamp(min=1)
            per[1::2].neg_()
            value, slope = loss.f((per * transformed).view(-1, 2).sum(1), options)
            parts = per * slope.repeat_interleave(2) * derivative
        elif loss.of == TWO:
            value, *slopes = loss.f(rewards[0::2], rewards[1::2], options)
            parts = options.beta * torch.stack(slopes, 1).flatten()
        else:
            value, parts = loss.f(policy, ref_logps, options)
        total, by_sequence = total + weight * value, by_sequence + weight * parts
    return total, by_sequence


def _divergence(v: Tensor, options: PairOptions) -> tuple[Tensor, Tensor]:
    """h(v) and h'(v), (S,) each; see `pair_loss`."""
    if options.f_divergence_type == "forward_kl":
        e = torch.exp(-v)
        return 1 - e, e
    if options.f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(v), torch.sigmoid(-v)
    power = options.f_alpha_divergence_coef - 1
    if options.f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
        clamped = torch.clamp(power * v, max=80.0)  # exp of more is no fp32 number
        e = torch.exp(clamped)
        return (e - 1) / power, e * (power * v <= 80.0)
    return v, torch.ones_like(v)


def _likelihood(lengths: Tensor, options: PairOptions, num_pairs: int, chosen_tokens: Tensor | None = None) -> Tensor:
    """k (S,): what is added to ∂L/∂ℓ_s; zero for rejected sequences."""
    k = -options.nll_weight / max(num_pairs, 1) / lengths.clamp(min=1)
    if weight := sum(weight for loss, weight in options.losses if loss.of == NONE):
        tokens = lengths[0::2].sum() if chosen_tokens is None else chosen_tokens
        k = k - weight / tokens.clamp(min=1)
    k[1::2] = 0
    return k


def sequence_coefficients(
    num_pairs: int,
    lengths: Tensor,
    options: PairOptions,
    alphas: Tensor | float | None = None,
    chosen_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """a and k, each (S,), of a loss of one number: c_s = a_s · f'(u_p) + k_s; k is None where all of it is zero.

    lengths (S,) floating; alphas: those of `Scored`, if known; chosen_tokens: see `score`.
    """
    alphas = _alphas(lengths, options) if alphas is None else alphas
    first = next((loss for loss, _ in options.losses if loss.of == ONE), OBJECTIVES["sigmoid"])
    scale = (options.beta if first.beta else 1.0) / max(num_pairs, 1)
    a = alphas * scale if isinstance(alphas, Tensor) else torch.full_like(lengths, alphas * scale)
    if first.per_token:
        a = a / lengths.clamp(min=1)
    a[1::2].neg_()
    return a, _likelihood(lengths, options, num_pairs, chosen_tokens) if options.adds_likelihood else None


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
