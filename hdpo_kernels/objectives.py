"""The losses of pairs, each with its derivatives: functions of one number a pair, of two, or of all pairs together.

    v_s = α_s ℓ_s − ρ_s       score of a sequence: policy's log-prob ℓ, weighted by α, against the reference's ρ
    r_s = β v_s               reward
    u_p = r_w − r_l           margin of a pair, w chosen, l rejected; per token: of scores divided by lengths

α weighs ℓ wherever a loss has it: with α = 1 each is the loss of its paper. ε: label_smoothing.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ONE, TWO, ALL, NONE = "one number", "two numbers", "all pairs", "likelihood"  # what a loss is a function of


class Objective(NamedTuple):
    """A loss type.

    of: ONE, f(u, options) -> f, f' (P,); TWO, f(r_w, r_l, options) -> f, ∂f/∂r_w, ∂f/∂r_l (P,); ALL, f(policy,
        ref_logps, options) -> f (P,), ∂f/∂policy (S,), of α-weighted and reference log-probs; NONE: the likelihood of
        chosen tokens alone.
    smoothing: whether ε is used: "no", "yes", or "needed".
    per_token: u is of scores divided by the sequences' lengths. beta: u is multiplied by β.
    """

    of: str
    f: Callable[..., Any] | None
    smoothing: str = "no"
    per_token: bool = False
    beta: bool = True


def _sigmoid(u: Tensor, o: Any) -> tuple[Tensor, Tensor]:
    """DPO with flipped labels (conservative DPO): −(1 − ε) log σ(u) − ε log σ(−u)"""
    minus = -u
    # ε σ(u) − (1 − ε) σ(−u) = ε − σ(−u)
    eps = o.label_smoothing
    return (eps - 1) * F.logsigmoid(u) - eps * F.logsigmoid(minus), eps - torch.sigmoid(minus)


def _hinge(u: Tensor, o: Any) -> tuple[Tensor, Tensor]:
    """SLiC (arXiv 2305.10425): max(0, 1 − u)"""
    eps = o.label_smoothing
    value = (1 - eps) * F.relu(1 - u) + eps * F.relu(1 + u)
    return value, eps * (u > -1).to(u.dtype) - (1 - eps) * (u < 1).to(u.dtype)


def _ipo(u: Tensor, o: Any) -> tuple[Tensor, Tensor]:
    """IPO (arXiv 2310.12036, eq. 17), per token: (u − 1/(2β))²"""
    eps, target = o.label_smoothing, 1 / (2 * o.beta)
    return (1 - eps) * (u - target) ** 2 + eps * (u + target) ** 2, 2 * (u - (1 - 2 * eps) * target)


def _exo_pair(u: Tensor, o: Any) -> tuple[Tensor, Tensor]:
    """EXO of preferences (arXiv 2402.00856, eq. 16): KL(σ(u), σ(−u) ‖ 1 − ε, ε)"""
    eps = o.label_smoothing
    log_w, log_l = F.logsigmoid(u) - math.log1p(-eps), F.logsigmoid(-u) - math.log(eps)
    won, lost = torch.sigmoid(u), torch.sigmoid(-u)
    return won * log_w + lost * log_l, won * lost * (log_w - log_l)


def _robust(u: Tensor, o: Any) -> tuple[Tensor, Tensor]:
    """Robust DPO (arXiv 2403.00409, eq. 15): [−(1 − ε) log σ(u) + ε log σ(−u)] / (1 − 2ε)"""
    eps = o.label_smoothing
    value = (eps * F.logsigmoid(-u) - (1 - eps) * F.logsigmoid(u)) / (1 - 2 * eps)
    return value, (-(1 - eps) * torch.sigmoid(-u) - eps * torch.sigmoid(u)) / (1 - 2 * eps)


def _discopop(u: Tensor, o: Any) -> tuple[Tensor, Tensor]:
    """DiscoPOP (arXiv 2406.08414, eq. 5): −(1 − m) log σ(u) + m exp(−u), m = σ(u/τ)"""
    tau = o.discopop_tau
    m, rest = torch.sigmoid(u / tau), torch.sigmoid(-u / tau)
    logistic, m_exp = -F.logsigmoid(u), torch.exp(F.logsigmoid(u / tau) - u)  # exp(−u) alone may be infinite
    value = rest * logistic + m_exp
    slope = -rest * torch.sigmoid(-u) - m * rest / tau * logistic + m_exp * (rest / tau - 1)
    return value, slope


def _nca_pair(w: Tensor, l: Tensor, o: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    """NCA of pairs (arXiv 2402.05369): −log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l)"""
    value = -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-l)
    return value, 0.5 * torch.sigmoid(w) - torch.sigmoid(-w), 0.5 * torch.sigmoid(l)


def _bco_pair(w: Tensor, l: Tensor, o: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    """BCO of pairs (arXiv 2404.04656), without a shift: −log σ(r_w) − log σ(−r_l)"""
    return -F.logsigmoid(w) - F.logsigmoid(-l), -torch.sigmoid(-w), torch.sigmoid(l)


def _sppo_hard(w: Tensor, l: Tensor, o: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    """SPPO with certain wins (arXiv 2405.00675, eq. 4.7): (v_w − 1/(2β))² + (v_l + 1/(2β))²"""
    square = 1 / o.beta**2
    return square * ((w - 0.5) ** 2 + (l + 0.5) ** 2), 2 * square * (w - 0.5), 2 * square * (l + 0.5)


def _apo_zero(w: Tensor, l: Tensor, o: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    """APO-zero (arXiv 2408.06266, eq. 7): 1 − σ(r_w) + σ(r_l)"""
    return torch.sigmoid(-w) + torch.sigmoid(l), -_bump(w), _bump(l)


def _apo_down(w: Tensor, l: Tensor, o: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    """APO-down (arXiv 2408.06266, eq. 8): σ(r_w) + 1 − σ(r_w − r_l)"""
    between = _bump(w - l)
    return torch.sigmoid(w) + torch.sigmoid(l - w), _bump(w) - between, between


def _bump(x: Tensor) -> Tensor:
    """σ′"""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _aot(policy: Tensor, ref_logps: Tensor | None, o: Any) -> tuple[Tensor, Tensor]:
    """AOT of pairs (arXiv 2406.05882): the policy's log-ratios, sorted, against the reference's, sorted"""
    chosen, rejected = policy.view(-1, 2).unbind(1)
    if ref_logps is None:
        ref_logps = torch.zeros_like(policy)
    ref_w, ref_l = ref_logps.view(-1, 2).unbind(1)
    ratios, order = torch.sort(chosen - rejected)
    value, slope = _sigmoid(o.beta * (ratios - torch.sort(ref_w - ref_l).values), o)
    by_pair = torch.empty_like(slope).scatter_(0, order, o.beta * slope)
    return value, torch.stack([by_pair, -by_pair], 1).flatten()


def _aot_unpaired(policy: Tensor, ref_logps: Tensor | None, o: Any) -> tuple[Tensor, Tensor]:
    """AOT of sets (arXiv 2406.05882): scores of the chosen, sorted, against those of the rejected, sorted"""
    scores = policy if ref_logps is None else policy - ref_logps
    (chosen, order_w), (rejected, order_l) = (torch.sort(each) for each in scores.view(-1, 2).unbind(1))
    value, slope = _sigmoid(o.beta * (chosen - rejected), o)
    by_chosen, by_rejected = (
        torch.empty_like(slope).scatter_(0, order, sign * o.beta * slope)
        for order, sign in ((order_w, 1.0), (order_l, -1.0))
    )
    return value, torch.stack([by_chosen, by_rejected], 1).flatten()


OBJECTIVES = {
    "sigmoid": Objective(ONE, _sigmoid, "yes"),
    "hinge": Objective(ONE, _hinge, "yes"),
    "ipo": Objective(ONE, _ipo, "yes", per_token=True, beta=False),
    "exo_pair": Objective(ONE, _exo_pair, "needed"),
    "nca_pair": Objective(TWO, _nca_pair),
    "robust": Objective(ONE, _robust, "yes"),
    "bco_pair": Objective(TWO, _bco_pair),
    "sppo_hard": Objective(TWO, _sppo_hard),
    "aot": Objective(ALL, _aot, "yes"),
    "aot_unpaired": Objective(ALL, _aot_unpaired, "yes"),
    "apo_zero": Objective(TWO, _apo_zero),
    "apo_down": Objective(TWO, _apo_down),
    "discopop": Objective(ONE, _discopop),
    "sft": Objective(NONE, None),
    "sigmoid_norm": Objective(ONE, _sigmoid, "yes", per_token=True),
}
