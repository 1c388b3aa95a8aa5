"""Sparse rows: where they are kept, how many entries they can have, and the random numbers that choose them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 2**32  # a uniform number is an integer below this


class Entries(NamedTuple):
    """n sparse rows; of row t the first counts[t] entries mean something, in the order of their columns."""

    columns: Tensor  # (n, B) int32
    values: Tensor  # (n, B) fp32 (fp64)
    counts: Tensor  # (n,) int32

    def rows(self, rows: slice) -> "Entries":
        return Entries(self.columns[rows], self.values[rows], self.counts[rows])


class Sampling(NamedTuple):
    """How rows are rounded, and where to."""

    epsilon: float
    draws: Tensor  # (n,) int64 in [0, 2³²): the one random number of each row
    entries: Entries

    def rows(self, rows: slice) -> "Sampling":
        return Sampling(self.epsilon, self.draws[rows], self.entries.rows(rows))


def most_entries(epsilon: float) -> int:
    """Bound on the entries of a row whatever its distribution: 1/ε + 2, one of which is room for rounding."""
    return math.ceil(1 / epsilon) + 2


def draw(num_rows: int, device: torch.device) -> Tensor:
    """One uniform number a row from torch's generator of the device, which `torch.manual_seed` seeds."""
    return torch.randint(DRAWS, (num_rows,), device=device)


def new_entries(num_rows: int, epsilon: float, dtype: torch.dtype, device: torch.device) -> Entries:
    """Room for the bound, zero: what is beyond a row's count adds nothing, and an operator may return it."""
    shape = (num_rows, most_entries(epsilon))
    return Entries(
        torch.zeros(shape, dtype=torch.int32, device=device),
        torch.zeros(shape, dtype=dtype, device=device),
        torch.zeros(num_rows, dtype=torch.int32, device=device),
    )
