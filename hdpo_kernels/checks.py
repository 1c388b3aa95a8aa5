"""What the public functions refuse at the door: a message names the offending value, and no device is asked for one."""

import itertools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from hdpo_kernels.naive import IGNORE_INDEX
from hdpo_kernels.sampled.entries import most_entries

GRADIENTS = ("exact", "sampled")


def check_head(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (N, H) and weight (V, H) with the same H, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has no vocabulary entry, shape (0, H)")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating, got {hidden.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(
                f"{name} is {tensor.dtype} but hidden is {hidden.dtype}: cast one of them, or run under torch.autocast"
            )
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden.device}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    check_labels(labels, hidden.shape[0], hidden.device)


def check_gradient(gradient: str, epsilon: float, vocab: int | None = None) -> None:
    """vocab: None where no head is known yet."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be {' or '.join(map(repr, GRADIENTS))}, got {gradient!r}")
    if gradient == "exact":
        return
    if not 0 < epsilon <= 0.5:
        raise ValueError(f"epsilon must be in (0, 0.5], got {epsilon}")
    if vocab is not None and most_entries(epsilon) > vocab:
        smallest = f", or take epsilon >= {1 / (vocab - 2):.3g}" if vocab >= 4 else ""
        raise ValueError(
            f"epsilon={epsilon:g} may keep 1/epsilon + 2 = {most_entries(epsilon)} entries of a row that has {vocab}: "
            f"gradient='exact' is cheaper then{smallest}"
        )


def check_labels(labels: Tensor, num_rows: int, device: torch.device) -> None:
    if labels.shape != (num_rows,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape ({num_rows},), got {labels.dtype} {tuple(labels.shape)}")
    if labels.device.type != "cpu" and labels.device != device:
        raise ValueError(f"labels are on {labels.device}; put them on {device} with the rest, or on the CPU")


def check_label_values(labels: Tensor, vocab: int) -> bool:
    """Whether all rows are known to have a label. Labels on a device are not looked at, which would be a sync: kernels
    answer a label outside the vocabulary with NaN.
    """
    if labels.device.type != "cpu":
        return False
    if not len(labels):
        return True
    lowest, highest = map(int, labels.aminmax())
    if lowest >= 0 and highest < vocab:
        return True
    outside = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"label {int(labels[row])} at row {row} is outside the vocabulary of {vocab} entries "
            f"({int(outside.sum())} such labels); use {IGNORE_INDEX} for rows that are not scored"
        )
    return False


def as_boundaries(cu_seqlens: Tensor | Sequence[int], *, pairs: bool = False) -> Tensor:
    """cu_seqlens as an integer tensor (S + 1,), S even if they are pairs; `boundaries` checks the values."""
    if not isinstance(cu_seqlens, Tensor):
        cu_seqlens = torch.tensor([operator.index(b) for b in cu_seqlens], dtype=torch.int64, device="cpu")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be integers of shape (S + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must run from 0 to the number of rows; got an empty list")
    if pairs and cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(
            f"cu_seqlens counts {cu_seqlens.shape[0] - 1} sequences; pairs need an even number, "
            "chosen and rejected in turn"
        )
    return cu_seqlens


def boundaries(cu_seqlens: Tensor, num_rows: int) -> list[int]:
    """The boundaries as a list of ints, or a ValueError that says what is wrong with them."""
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_rows:
        raise ValueError(
            f"cu_seqlens must run from 0 to the number of rows, {num_rows}; got {bounds[0]} … {bounds[-1]}"
        )
    for s, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens must not decrease; sequence {s} runs from {start} to {end}")
    return bounds


def check_ref_logps(ref_logps: Tensor | None, num_sequences: int, device: torch.device) -> None:
    if ref_logps is None:
        return
    if ref_logps.shape != (num_sequences,) or not ref_logps.is_floating_point():
        raise ValueError(
            f"ref_logps must be floating with one entry a sequence, ({num_sequences},); "
            f"got {ref_logps.dtype} {tuple(ref_logps.shape)}"
        )
    if ref_logps.device != device:
        raise ValueError(f"ref_logps are on {ref_logps.device} but the rest is on {device}")
    if ref_logps.requires_grad:
        raise ValueError("ref_logps require grad, but the reference is frozen: detach them")
