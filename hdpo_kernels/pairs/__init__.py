"""The pair operation, from rows to the loss: sums over the sequences of each pair → its loss → what scales its rows.

    stats (3, N) ── sums ──> logps, entropy, accuracy (S,) ── pair.py's maths ──> terms, slope (P,), rewards (S,)
    row_scale (N,) <── spread ── c (S,) = a · slope + k <──────────────────────────┘

torch.py and triton.py have the same function:
    score_pairs(out, first, last, rows, options, sp, need)  -> out, in which pairs first … last - 1 are filled now
"""

from types import ModuleType

from torch import Tensor

from hdpo_kernels.device import ACCELERATORS


def pair_operation(tensor: Tensor) -> ModuleType:
    """The module whose pair operation runs on this tensor."""
    if tensor.device.type in ACCELERATORS and tensor.element_size() < 8:
        from hdpo_kernels.pairs import triton as triton_pairs

        return triton_pairs
    from hdpo_kernels.pairs import torch as torch_pairs

    return torch_pairs
