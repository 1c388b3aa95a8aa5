"""The problems that are measured, by name: the heads of real models, and the sequences that go through them."""

from typing import NamedTuple

import torch
from torch import Tensor

from hdpo_kernels import linear_hdpo_loss
from hdpo_kernels.naive import IGNORE_INDEX
from hdpo_kernels.testing import HeadInputs, zipf_inputs


class Head(NamedTuple):
    hidden_size: int
    vocab: int
    softcap: float | None = None


HEADS = {
    "V=32000 H=512": Head(512, 32000),  # what two CPU cores can do
    "Qwen2.5-0.5B": Head(896, 151936),
    "Llama-3.2-1B": Head(2048, 128256),
    "Gemma-2-2B": Head(2304, 256000, softcap=30.0),
    "Qwen2.5-7B": Head(3584, 152064),
    "Llama-3-8B": Head(4096, 128256),
}

# Zipf inputs are sharp enough at 8 to look like a trained model. At 86 the label leads most of the vocabulary by 90 to
# 100 nats, where exp in fp32 is neither normal (above −87.3) nor zero (below −103.3).
_ORDINARY, _PEAKED = 8.0, 86.0


class Shape(NamedTuple):
    """A problem before its tensors are made."""

    name: str
    head: Head
    lengths: tuple[int, ...]  # rows of each sequence
    dtype: torch.dtype
    masked: bool = False  # the first half of every sequence is prompt: its labels are -100
    peaked: bool = False  # most probabilities are denormal

    @property
    def gemm_flops(self) -> int:
        """Floating-point operations of one GEMM over the rows that are scored."""
        rows = sum(length - length // 2 if self.masked else length for length in self.lengths)
        return 2 * rows * self.head.vocab * self.head.hidden_size


class Problem(NamedTuple):
    """What contestants get: the arguments of `linear_hdpo_loss`; hidden and weight need a gradient."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,), on the device
    cu_seqlens: list[int]
    ref_logps: Tensor  # (S,)
    softcap: float | None
    host_labels: Tensor  # labels on the CPU, where a collator makes them

    @property
    def inputs(self) -> HeadInputs:
        return HeadInputs(self.hidden.detach(), self.weight.detach(), *self[2:5])


def make_problem(shape: Shape, device: str) -> Problem:
    """Random inputs like a language model's, their reference near the policy: a saturated loss has no gradient."""
    head = shape.head
    inputs = zipf_inputs(
        shape.lengths, head.vocab, head.hidden_size, dtype=shape.dtype, device=device,
        sharpness=_PEAKED if shape.peaked else _ORDINARY,
    )  # fmt: skip
    if shape.masked:
        for start, length in zip(inputs.cu_seqlens[:-1], shape.lengths, strict=True):
            inputs.labels[start : start + length // 2] = IGNORE_INDEX
    with torch.no_grad():
        logps = linear_hdpo_loss(*inputs[:4], None, softcap=head.softcap).logps
    noise = torch.randn(len(shape.lengths), generator=torch.Generator().manual_seed(0)).to(device)
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    return Problem(hidden, weight, inputs.labels, inputs.cu_seqlens, logps + noise, head.softcap, inputs.labels.cpu())
