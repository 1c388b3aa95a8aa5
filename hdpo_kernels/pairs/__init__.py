"""The pair operation, from rows to the loss: sums over the sequences of each pair → its loss → what scales its rows.

    stats (2, N) ── sums ──> logps, entropy (S,) ── pair.py's maths ──> terms, slope (P,), rewards (S,)
    row_scale (N,) <── spread ── c (S,) = a · slope + k <──────────────────────────┘

torch.py and triton.py have the same function:
    score_pairs(out, first, last, rows, options, sp, need)  -> out, in which pairs first … last - 1 are filled now
"""

from types import ModuleType
from typing import NamedTuple

from torch import Tensor, empty

from hdpo_kernels.device import ACCELERATORS


class ScoredStats(NamedTuple):
    """Rows of sequences whose token log-probabilities are known, or will be when their pairs' turn comes."""

    stats: Tensor  # (2, N) logp and entropy of each row, nats, zero where it is not scored
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
    rewards: Tensor  # (S,) β(α_s ℓ − ρ)
    margins: Tensor  # (P,) chosen − rejected
    row_scale: Tensor  # (N,) ∂loss/∂ℓ of each row's sequence; (0,) where no gradient is wanted


def new_pairs(rows: ScoredStats, with_grad: bool) -> Pairs:
    """Room for all pairs, not filled."""
    num_sequences, num_rows = len(rows.bounds) - 1, rows.stats.shape[1]
    num_pairs = num_sequences // 2
    sizes = (num_pairs, num_pairs, *[num_sequences] * 3, num_pairs, num_rows if with_grad else 0)
    return Pairs(*(empty(size, dtype=rows.stats.dtype, device=rows.stats.device) for size in sizes))


def pair_operation(tensor: Tensor) -> ModuleType:
    """The module whose pair operation runs on this tensor."""
    if tensor.device.type in ACCELERATORS and tensor.element_size() < 8:
        from hdpo_kernels.pairs import triton as triton_pairs

        return triton_pairs
    from hdpo_kernels.pairs import torch as torch_pairs

    return torch_pairs
