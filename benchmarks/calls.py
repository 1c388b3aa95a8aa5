"""What calls start and hold on a GPU, without one: launches, copies from the host and peak memory.

Counted by `fake_gpu` at the sizes of real models; `python -m benchmarks.static` writes results/launches.csv.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.fake_gpu import FakeGPU, pretended
from benchmarks.shapes import HEADS, Head
from hdpo_kernels import hdpo_loss, linear_hdpo_loss, linear_logp
from hdpo_kernels.naive import IGNORE_INDEX

BF16, FP32 = torch.bfloat16, torch.float32
LOSS, LOGITS, LOGP = "linear_hdpo_loss", "hdpo_loss", "linear_logp"


class Call(NamedTuple):
    """One forward, and one backward where a gradient is needed."""

    name: str
    head: Head
    lengths: tuple[int, ...]  # rows of each sequence
    function: str = LOSS
    kind: str = "cuda"  # of device: cuda, hip or xpu
    weight_dtype: torch.dtype = BF16  # under autocast to bf16 if it is another
    masked: bool = False  # the first half of every sequence has no label
    labels_on_device: bool = False
    sampled: bool = False  # the gradient
    needs_grad: bool = True

    @property
    def num_rows(self) -> int:
        return sum(self.lengths)


class Outcome(NamedTuple):
    gpu: FakeGPU
    forward: "Counts"
    backward: "Counts | None"
    results: tuple[Any, ...]
    gradients: list[Tensor | None]  # of hidden and weight, or of logits
    inputs: tuple[Tensor, ...]  # the same


class Counts(NamedTuple):
    call: str
    step: str  # forward or backward
    operations: int  # of torch that start a kernel or a copy
    kernels: int  # launches of the package's Triton kernels
    pageable: int  # copies from memory of the host that is not pinned
    peak_mib: float  # in use at a time until the end of the step, above the inputs
    torch: str  # version

    @property
    def launches(self) -> int:
        return self.operations + self.kernels


LLAMA, QWEN, GEMMA, GPT2 = HEADS["Llama-3-8B"], HEADS["Qwen2.5-0.5B"], HEADS["Gemma-2-2B"], Head(768, 50257)
PAIRS = (512,) * 16
SMALL = Call("Qwen2.5-0.5B, 2 pairs, N=1024", QWEN, (256,) * 4)
ODD = Call("GPT-2, V=50257, 8 pairs, N=8192", GPT2, PAIRS)
LARGE = Call("Llama-3-8B, 8 pairs, N=8192", LLAMA, PAIRS)
LONG = Call("Llama-3-8B, one pair of 2 × 65536", LLAMA, (65536, 65536))
CALLS = (
    SMALL,
    ODD,
    LARGE,
    LONG,
    Call("Llama-3-8B, two pairs of 2 × 8192", LLAMA, (8192,) * 4),
    Call("Llama-3-8B, 8 pairs, half masked", LLAMA, PAIRS, masked=True),
    Call("Llama-3-8B, 8 pairs, labels on the device", LLAMA, PAIRS, labels_on_device=True),
    Call("Llama-3-8B, 8 pairs, fp32 under autocast", LLAMA, PAIRS, weight_dtype=FP32),
    Call("Llama-3-8B, 8 pairs, sampled", LLAMA, PAIRS, sampled=True),
    Call("Gemma-2-2B, V=256000, softcap, 8 pairs", GEMMA, PAIRS),
    Call("Llama-3-8B, 8 pairs, from logits", LLAMA, PAIRS, LOGITS),
    Call("Llama-3-8B, 8 pairs, linear_logp", LLAMA, PAIRS, LOGP),
    Call("Llama-3-8B, 8 pairs, no gradient", LLAMA, PAIRS, needs_grad=False),
    Call("Qwen2.5-0.5B, 8 pairs, no gradient", QWEN, PAIRS, needs_grad=False),
    Call("Llama-3-8B, 8 pairs, ROCm", LLAMA, PAIRS, kind="hip"),
    Call("Llama-3-8B, 8 pairs, XPU", LLAMA, PAIRS, kind="xpu"),
)


def run(call: Call, index: int = 0) -> Outcome:
    """index: of the device that the tensors are on, while device 0 is the current one."""
    with pretended(call.kind, index) as gpu, _autocast(gpu.device.type, call.weight_dtype != BF16):
        inputs = _inputs(call, gpu)
        results = _call(call, gpu, inputs)
        forward = _counts(call, "forward", gpu)
        if not call.needs_grad:
            return Outcome(gpu, forward, None, results, [], inputs)
        gradients = gpu.backward(results[0], inputs)
        total = _counts(call, "backward", gpu)
    sums = {name: getattr(total, name) - getattr(forward, name) for name in ("operations", "kernels", "pageable")}
    return Outcome(gpu, forward, total._replace(**sums), results, gradients, inputs)


def measure() -> list[Counts]:
    counts = []
    for call in CALLS:
        outcome = run(call)
        counts += [outcome.forward] if outcome.backward is None else [outcome.forward, outcome.backward]
    return counts


def _inputs(call: Call, gpu: FakeGPU) -> tuple[Tensor, ...]:
    n, head, needs = call.num_rows, call.head, call.needs_grad
    if call.function == LOGITS:
        return (gpu.tensor(n, head.vocab, dtype=call.weight_dtype, needs_grad=needs),)
    hidden = gpu.tensor(n, head.hidden_size, needs_grad=needs)
    return hidden, gpu.tensor(head.vocab, head.hidden_size, dtype=call.weight_dtype, needs_grad=needs)


def _call(call: Call, gpu: FakeGPU, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The results, first of them what a backward starts from."""
    bounds = torch.tensor([0, *itertools.accumulate(call.lengths)])
    labels = torch.zeros(call.num_rows, dtype=torch.int64)
    if call.masked:
        for start, length in zip(bounds[:-1].tolist(), call.lengths, strict=True):
            labels[start : start + length // 2] = IGNORE_INDEX
    if call.labels_on_device:
        labels = gpu.tensor(call.num_rows, dtype=torch.int64)
    arguments: list[Any] = [*inputs, labels]
    if call.function == LOGP:
        return linear_logp(*arguments, softcap=call.head.softcap)
    arguments += [bounds, gpu.tensor(len(call.lengths), dtype=FP32)]
    if call.function == LOGITS:
        return hdpo_loss(*arguments, softcap=call.head.softcap)
    gradient = "sampled" if call.sampled else "exact"
    return linear_hdpo_loss(*arguments, softcap=call.head.softcap, gradient=gradient)


def _counts(call: Call, step: str, gpu: FakeGPU) -> Counts:
    launched = (gpu.operations.total(), gpu.kernels.total(), len(gpu.pageable))
    return Counts(call.name, step, *launched, round(gpu.peak_bytes / 2**20, 1), torch.__version__.split("+")[0])


@contextmanager
def _autocast(device_type: str, enabled: bool) -> Iterator[None]:
    """`torch.autocast` to bf16, which turns itself off where there is no such device."""
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, enabled)
    torch.set_autocast_dtype(device_type, BF16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])
