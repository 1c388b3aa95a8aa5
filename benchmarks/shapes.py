"""The problems that are measured, by name: the heads of real models, and the sequences that go through them."""

import itertools
import random
from typing import Any, NamedTuple

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
_SOFTEST, _SHARPEST = 0.0, 30.0  # between them entropy falls: from 6.8 to 0.1 nats for V = 32,000


class Shape(NamedTuple):
    """A problem before its tensors are made."""

    name: str
    head: Head
    lengths: tuple[int, ...]  # rows of each sequence
    dtype: torch.dtype
    masked: bool = False  # the first half of every sequence is prompt: its labels are -100
    peaked: bool = False  # most probabilities are denormal
    entropy: float | None = None  # mean nats of a row, if it matters
    sft_steps: int | None = None  # not made up: the quickstart's model after so much SFT; its answers have the lengths

    @property
    def gemm_flops(self) -> int:
        """Floating-point operations of one GEMM over the rows that are scored."""
        rows = sum(length - length // 2 if self.masked else length for length in self.lengths)
        return 2 * rows * self.head.vocab * self.head.hidden_size


def drawn_lengths(sequences: int, rows: int) -> tuple[int, ...]:
    """Rows of each sequence, that many in all: drawn between 0.4 and 1.6 times their average, the same every time."""
    rng = random.Random(1)
    *before, total = itertools.accumulate(rng.uniform(0.4, 1.6) for _ in range(sequences))
    ends = [0, *(round(rows * end / total) for end in before), rows]
    return tuple(end - start for start, end in itertools.pairwise(ends))


class Problem(NamedTuple):
    """What contestants get: the arguments of `linear_hdpo_loss`; hidden and weight need a gradient."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,), on the device
    cu_seqlens: list[int]
    ref_logps: Tensor  # (S,)
    softcap: float | None
    host_labels: Tensor  # labels on the CPU, where a collator makes them, in pinned memory if there is a GPU

    @property
    def inputs(self) -> HeadInputs:
        return HeadInputs(self.hidden.detach(), self.weight.detach(), *self[2:5])


def make_problem(shape: Shape, device: str) -> Problem:
    """Random inputs like a language model's, or those of a small one."""
    if shape.sft_steps is not None:
        return _quickstart_problem(shape.sft_steps, shape.dtype, device)
    head = shape.head
    sharpness = _PEAKED if shape.peaked else _ORDINARY
    if shape.entropy is not None:
        sharpness = _sharpness(shape, device)
    inputs = zipf_inputs(
        shape.lengths, head.vocab, head.hidden_size, dtype=shape.dtype, device=device, sharpness=sharpness
    )
    if shape.masked:
        for start, length in zip(inputs.cu_seqlens[:-1], shape.lengths, strict=True):
            inputs.labels[start : start + length // 2] = IGNORE_INDEX
    return with_reference(*inputs[:4], head.softcap)


def _quickstart_problem(sft_steps: int, dtype: torch.dtype, device: str) -> Problem:
    """A trained head: the quickstart's model after its SFT, one pair for each held-out prompt.

    Of a pair, the chosen answer is a demonstration and the rejected one the model's own; rows are the answers' tokens.
    """
    from hdpo_train import quickstart
    from hdpo_train.evaluation.sampler import SamplingOptions, answers
    from hdpo_train.quickstart import task

    settings = quickstart.Settings(sft_steps=sft_steps)
    taught, prompts = task.split_prompts(settings.held_out, settings.seed)
    model, tokenizer = quickstart.sft(taught, settings)
    options = SamplingOptions(1, max_new_tokens=quickstart.task.MAX_NEW_TOKENS, batch_size=1024, seed=settings.seed)
    drawn = answers(model, tokenizer, prompts, options)
    rng = random.Random(settings.seed)
    demonstrated = [task.demonstrate(prompt, rng) for prompt in prompts]
    texts = [
        prompt + answer + str(tokenizer.eos_token)
        for prompt, right, own in zip(prompts, demonstrated, drawn, strict=True)
        for answer in (right, *own)
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    starts = torch.tensor([len(ids) for ids in tokenizer(prompts)["input_ids"]]).repeat_interleave(2)
    ids = batch["input_ids"]
    answered = (torch.arange(ids.shape[1]) >= starts.unsqueeze(1)) & (batch["attention_mask"] != 0)
    backbone: Any = model.model
    with torch.no_grad():
        states = backbone(**batch).last_hidden_state  # each is what predicts the next token
    hidden, weight = states[:, :-1][answered[:, 1:]], model.lm_head.weight.detach()
    cu_seqlens = [0, *itertools.accumulate(answered.sum(1).tolist())]
    return with_reference(hidden.to(device, dtype), weight.to(device, dtype), ids[answered].to(device), cu_seqlens)


def with_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, cu_seqlens: list[int], softcap: float | None = None
) -> Problem:
    """The problem whose reference is near the policy: a saturated loss has no gradient."""
    with torch.no_grad():
        logps = linear_hdpo_loss(hidden, weight, labels, cu_seqlens, None, softcap=softcap).logps
    noise = torch.randn(len(logps), generator=torch.Generator().manual_seed(0)).to(logps.device)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    on_host = labels.cpu().pin_memory() if labels.is_cuda else labels
    return Problem(hidden, weight, labels, cu_seqlens, logps + noise, softcap, on_host)


def _sharpness(shape: Shape, device: str) -> float:
    """The sharpness at which the rows of Zipf inputs have the shape's mean entropy, by bisection.

    Hidden states, hence logits, are affine in it, so two GEMMs are enough.
    """
    assert shape.entropy is not None
    sizes = (shape.lengths, shape.head.vocab, shape.head.hidden_size)
    zero, one = (zipf_inputs(*sizes, device=device, sharpness=sharpness) for sharpness in (0.0, 1.0))
    logits, slope = zero.hidden @ zero.weight.T, (one.hidden - zero.hidden) @ zero.weight.T
    slices = list(zip(logits.split(512), slope.split(512), strict=True))

    def entropy(sharpness: float) -> float:
        total = 0.0
        for z, dz in slices:
            logp = torch.add(z, dz, alpha=sharpness).log_softmax(-1)
            total -= (logp.exp() * logp).sum().item()
        return total / len(logits)

    low, high = _SOFTEST, _SHARPEST
    if not entropy(low) > shape.entropy > entropy(high):
        raise ValueError(f"no mean entropy of {shape.entropy} nats: from {entropy(low):.2f} to {entropy(high):.2f}")
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(middle) > shape.entropy else (low, middle)
    return (low + high) / 2
