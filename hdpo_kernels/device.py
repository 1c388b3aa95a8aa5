"""The device that kernels start on, and how numbers of the host get there without waiting for it."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

ACCELERATORS = ("cuda", "xpu")  # on which Triton kernels run; ROCm's devices call themselves "cuda"


def on_device(device: torch.device) -> AbstractContextManager:
    """What computes runs in this, from now on: the device of its tensors is the current one, where Triton launches, and
    autocast leaves its GEMMs alone.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()  # a compiled graph sees to its devices itself
    with_autocast = torch.is_autocast_enabled(device.type)
    if device.type not in ACCELERATORS and not with_autocast:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if device.type in ACCELERATORS:
        stack.enter_context(torch.get_device_module(device).device(device))
    if with_autocast:
        stack.enter_context(torch.autocast(device.type, enabled=False))
    return stack


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of integers on the device: those of the host in one copy, out of pinned memory.

    A copy out of pageable memory may wait for all that the stream still has to do. A tensor that is pinned already is
    copied from where it is: a captured CUDA graph then reads what its owner writes there.
    """
    if device.type == "cpu":
        return [t.to(device) for t in tensors]
    pageable = [t for t in tensors if t.device.type == "cpu" and not t.is_pinned()]
    staged = iter(_stage(pageable, device))
    return [
        next(staged) if t.device.type == "cpu" and not t.is_pinned() else t.to(device, non_blocking=True)
        for t in tensors
    ]


def _stage(tensors: list[Tensor], device: torch.device) -> Sequence[Tensor]:
    if not tensors:
        return ()
    sizes = [t.numel() for t in tensors]
    staging = torch.empty(sum(sizes), dtype=torch.int64, device="cpu", pin_memory=device.type in ACCELERATORS)
    torch.cat([t.to(torch.int64) for t in tensors], out=staging)
    return staging.to(device, non_blocking=True).split(sizes)
