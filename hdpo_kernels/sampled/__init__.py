"""The sampled gradient: rows of it rounded, without bias, to a few entries, and their products with matrices.

    g_t = ∂logp_t/∂logits_t = (onehot(y_t) − p_t) · chain_t  ≈  Σ_j values_tj · onehot(columns_tj),  equal in expectation
    d_hidden_t = c_t · Σ_j values_tj W[columns_tj]               d_weight[v] = Σ_{t, j: columns_tj = v} c_t values_tj h_t

Rows are rounded where logits are at hand, by `rows.row_stats`; README.md has the estimator and its proofs. The modules
torch.py and triton.py have the same two functions, n rows of at most B entries, V vocabulary, H hidden size:
    gather(entries, weight (V, H), scale (n,), dtype)  -> d_hidden (n, H)
    gather_transposed(entries, hidden (n, H), scale (n,), vocab, dtype, need_weight, need_bias)  -> d_weight, d_bias
"""

from types import ModuleType
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
    """Bound on the entries of a row whatever its distribution: 1/ε + 2."""
    return int(1 / epsilon) + 2


def check_epsilon(epsilon: float, vocab: int) -> None:
    if not 0 < epsilon <= 0.5:
        raise ValueError(f"epsilon must be in (0, 0.5], got {epsilon}")
    if most_entries(epsilon) > vocab:
        raise ValueError(
            f"epsilon={epsilon:g} keeps up to 1/epsilon + 2 = {most_entries(epsilon)} entries of a row that has {vocab}: "
            "gradient='exact' is then cheaper; "
            + (f"or take epsilon >= {1 / (vocab - 2):.2g}" if vocab > 3 else "a vocabulary this small needs no sampling")
        )


def draw(num_rows: int, device: torch.device) -> Tensor:
    """One uniform number a row from torch's generator of the device, which `torch.manual_seed` seeds."""
    return torch.randint(DRAWS, (num_rows,), device=device)


def empty_entries(num_rows: int, epsilon: float, dtype: torch.dtype, device: torch.device) -> Entries:
    shape = (num_rows, most_entries(epsilon))
    return Entries(
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=dtype, device=device),
        torch.zeros(num_rows, dtype=torch.int32, device=device),
    )


def products(tensor: Tensor) -> ModuleType:
    """The module whose products run on this tensor."""
    if tensor.device.type in ("cuda", "xpu") and tensor.element_size() < 8:
        from hdpo_kernels.sampled import triton as triton_products

        return triton_products
    from hdpo_kernels.sampled import torch as torch_products

    return torch_products
