"""What goes into the pair operation, and what comes out of it."""

from typing import NamedTuple

from torch import Tensor, empty


class ScoredStats(NamedTuple):
    """Rows of sequences whose token log-probabilities are known, or will be when their pairs' turn comes."""

    stats: Tensor  # (3, N) `TokenLogp` of each row, zero where it is not scored
    labels: Tensor  # (N,)
    bounds: list[int]  # S + 1 boundaries of the sequences
    cu_seqlens: Tensor  # (S + 1,) the same on the device
    ref_logps: Tensor | None  # (S,)
    all_scored: bool = False  # known to have no label -100
    lengths: Tensor | None = None  # (S,) scored tokens; with ranks that share the sequences: of all of them


class Pairs(NamedTuple):
    """What the loss makes of P pairs, S = 2P sequences, N rows."""

    terms: Tensor  # (P,) their sum is the loss
    slope: Tensor  # (P,) f'(u) of a loss of one number, else zero
    logps: Tensor  # (S,) nats
    entropy: Tensor  # (S,) mean nats per scored token
    accuracy: Tensor  # (S,) share of scored tokens with is_top1
    rewards: Tensor  # (S,) β(α_s ℓ − ρ)
    margins: Tensor  # (P,) chosen − rejected
    row_scale: Tensor  # (N,) ∂loss/∂ℓ of each row's sequence; (0,) where no gradient is wanted


def new_pairs(rows: ScoredStats, with_grad: bool) -> Pairs:
    """Room for all pairs, not filled."""
    num_sequences, num_rows = len(rows.bounds) - 1, rows.stats.shape[1]
    num_pairs = num_sequences // 2
    sizes = (num_pairs, num_pairs, *[num_sequences] * 4, num_pairs, num_rows if with_grad else 0)
    return Pairs(*(empty(size, dtype=rows.stats.dtype, device=rows.stats.device) for size in sizes))
