"""The pair operation as one Triton kernel, a program a pair. Its loss maths is that of pair.py, held to it by a test.

N rows, S = 2P sequences; sums over rows are kept per lane and reduced once, in a fixed order.
"""

import triton
import triton.language as tl

from hdpo_kernels.naive import IGNORE_INDEX
from hdpo_kernels.objectives import ONE
from hdpo_kernels.pair import PairOptions
from hdpo_kernels.pairs import torch as torch_pairs
from hdpo_kernels.pairs.scored import Pairs, ScoredStats, new_pairs
from hdpo_kernels.parallel import Ranks

_IGNORE_INDEX = tl.constexpr(IGNORE_INDEX)
LOSSES = ("sigmoid", "hinge", "ipo")  # that the kernel has; pairs/torch.py has all
_SIGMOID, _HINGE, _IPO = (tl.constexpr(LOSSES.index(name)) for name in LOSSES)
BLOCK_N = 1024  # rows that a program sums at a time


@triton.jit
def _sum_rows(stats_ptr, N, labels_ptr, start, end, BLOCK_N: tl.constexpr):
    """Sums of logp, entropy and is_top1, and the number of scored rows, of one sequence."""
    logp = tl.zeros([BLOCK_N], tl.float32)
    entropy = tl.zeros([BLOCK_N], tl.float32)
    top1 = tl.zeros([BLOCK_N], tl.float32)
    scored = tl.zeros([BLOCK_N], tl.int32)
    for first in range(start, end, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        logp += tl.load(stats_ptr + offs_n, mask=mask_n, other=0.0)
        entropy += tl.load(stats_ptr + N + offs_n, mask=mask_n, other=0.0)
        top1 += tl.load(stats_ptr + 2 * N + offs_n, mask=mask_n, other=0.0)
        label = tl.load(labels_ptr + offs_n, mask=mask_n, other=_IGNORE_INDEX)
        scored += (label != _IGNORE_INDEX).to(tl.int32)
    length = tl.maximum(tl.sum(scored, 0), 1).to(tl.float32)  # an empty sequence divides by 1, not by 0
    return tl.sum(logp, 0), tl.sum(entropy, 0), tl.sum(top1, 0), length


@triton.jit
def _fill_rows(out_ptr, start, end, value, BLOCK_N: tl.constexpr):
    for first in range(start, end, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        tl.store(out_ptr + offs_n, tl.zeros([BLOCK_N], tl.float32) + value, mask=offs_n < end)


@triton.jit
def _log_sigmoid(x):
    e = tl.exp(-tl.abs(x))
    rounded = 1.0 + e
    # log(1 + e) with all digits of a small e, which its rounding in `rounded` loses
    log1p = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    return tl.where(x > 0, 0.0, x) - log1p


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)  # of NaN it is NaN


@triton.jit
def _objective(u, beta, smoothing, LOSS: tl.constexpr):
    """f(u) and f'(u); see objectives.py."""
    if LOSS == _SIGMOID:
        value = -(1.0 - smoothing) * _log_sigmoid(u) - smoothing * _log_sigmoid(-u)
        slope = smoothing - _sigmoid(-u)
    elif LOSS == _HINGE:
        value = (1.0 - smoothing) * _relu(1.0 - u) + smoothing * _relu(1.0 + u)
        slope = tl.where(u > -1.0, smoothing, 0.0) - tl.where(u < 1.0, 1.0 - smoothing, 0.0)
    else:
        target = 0.5 / beta
        near, far = (u - target) * (u - target), (u + target) * (u + target)
        value = (1.0 - smoothing) * near + smoothing * far
        slope = 2.0 * (u - (1.0 - 2.0 * smoothing) * target)
    return value, slope


@triton.jit(
    do_not_specialize=["N", "first", "num_pairs"], do_not_specialize_on_alignment=["stats_ptr", "ref_logps_ptr"]
)
def _pair_kernel(
    stats_ptr, N, labels_ptr, cu_seqlens_ptr, ref_logps_ptr, terms_ptr, slope_ptr, logps_ptr, entropy_ptr, accuracy_ptr,
    rewards_ptr, margins_ptr, row_scale_ptr, first, num_pairs, alpha, beta, smoothing, nll_weight, LOSS: tl.constexpr,
    BY_TOKEN: tl.constexpr, HAS_REF: tl.constexpr, HAS_GRAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One pair: everything of it in `Pairs`, from the statistics of its rows."""
    pair = first + tl.program_id(0)
    chosen, rejected = 2 * pair, 2 * pair + 1
    start = tl.load(cu_seqlens_ptr + chosen).to(tl.int64)
    middle = tl.load(cu_seqlens_ptr + rejected).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + rejected + 1).to(tl.int64)
    logp_w, entropy_w, top1_w, n_w = _sum_rows(stats_ptr, N, labels_ptr, start, middle, BLOCK_N)
    logp_l, entropy_l, top1_l, n_l = _sum_rows(stats_ptr, N, labels_ptr, middle, end, BLOCK_N)

    alpha_w, alpha_l = alpha, alpha
    if BY_TOKEN:  # see `pair._alphas`
        alpha_w += (alpha - 1.0) * (n_l - n_w) / (2.0 * n_w)
        alpha_l += (alpha - 1.0) * (n_w - n_l) / (2.0 * n_l)
    score_w, score_l = alpha_w * logp_w, alpha_l * logp_l
    if HAS_REF:
        score_w -= tl.load(ref_logps_ptr + chosen).to(tl.float32)
        score_l -= tl.load(ref_logps_ptr + rejected).to(tl.float32)
    weight_w, weight_l = beta, -beta
    if LOSS == _IPO:
        weight_w, weight_l = 1.0 / n_w, -1.0 / n_l
    value, slope = _objective(weight_w * score_w + weight_l * score_l, beta, smoothing, LOSS)

    share = 1.0 / num_pairs
    term = value * share
    if nll_weight != 0.0:  # 0 · ∞ is NaN
        term -= nll_weight * share * (logp_w / n_w)
    tl.store(terms_ptr + pair, term)
    tl.store(slope_ptr + pair, slope)
    tl.store(logps_ptr + chosen, logp_w)
    tl.store(logps_ptr + rejected, logp_l)
    tl.store(entropy_ptr + chosen, entropy_w / n_w)
    tl.store(entropy_ptr + rejected, entropy_l / n_l)
    tl.store(accuracy_ptr + chosen, top1_w / n_w)
    tl.store(accuracy_ptr + rejected, top1_l / n_l)
    tl.store(rewards_ptr + chosen, beta * score_w)
    tl.store(rewards_ptr + rejected, beta * score_l)
    tl.store(margins_ptr + pair, beta * score_w - beta * score_l)
    if HAS_GRAD:
        _fill_rows(row_scale_ptr, start, middle, alpha_w * share * weight_w * slope - nll_weight * share / n_w, BLOCK_N)
        _fill_rows(row_scale_ptr, middle, end, alpha_l * share * weight_l * slope, BLOCK_N)


def score_pairs(
    out: Pairs | None, first: int, last: int, rows: ScoredStats, options: PairOptions, sp: Ranks, need: bool
) -> Pairs:
    """Pairs first … last - 1, their rows all scored by now; see pairs/torch.py."""
    name, *others = options.names
    known = name in LOSSES and not others and options.losses[0][1] == 1 and options.kind == ONE
    if sp.group is not None or not known:  # between sums and losses other ranks have a word
        return torch_pairs.score_pairs(out, first, last, rows, options, sp, need)
    out = new_pairs(rows, need) if out is None else out
    if last > first:
        stats, ref_logps = rows.stats, None if rows.ref_logps is None else rows.ref_logps.contiguous()
        assert stats.is_contiguous() and rows.labels.is_contiguous() and rows.cu_seqlens.is_contiguous()
        _pair_kernel[(last - first,)](
            stats, stats.shape[1], rows.labels, rows.cu_seqlens, stats if ref_logps is None else ref_logps, *out,
            first, len(out.terms), float(options.alpha), float(options.beta), float(options.label_smoothing),
            float(options.nll_weight), LOSS=LOSSES.index(name),
            BY_TOKEN=options.alpha_level == "token", HAS_REF=ref_logps is not None, HAS_GRAD=need, BLOCK_N=BLOCK_N,
        )  # fmt: skip
    return out
