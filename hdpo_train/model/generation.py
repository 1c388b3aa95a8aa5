"""A model's own answers, drawn from its own distribution, and their exact entropy."""

import math
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hdpo_kernels import linear_logp
from hdpo_train.model.head import HeadTransform, bare, find_transform, head_of
from hdpo_train.model.loading import backbone_of, evaluating


@torch.no_grad()
def own_entropy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    max_new_tokens: int,
    seed: int,
    batch_size: int = 64,
) -> tuple[float, int]:
    """Sum of nats, and tokens, of one answer to each prompt, drawn from the model's own distribution.

    An answer is cut where the model's positions end. The random numbers are always those of the seed; torch's own
    generator is left as it was.
    """
    transform, nats, tokens = find_transform(bare(model)), 0.0, 0
    by_length = sorted(prompt_ids, key=len)  # so that long prompts cut no answer but their own
    with drawing(model), own_distribution(model, tokenizer, max_new_tokens) as ends:
        torch.manual_seed(seed)
        for start in range(0, len(by_length), batch_size):
            prompts = by_length[start : start + batch_size]
            room = max((positions(model) or math.inf) - len(prompts[-1]), 1)
            completions = complete(model, prompts, 1.0, ends, max_new_tokens=int(min(max_new_tokens, room)))
            nats += sum(entropies(model, transform, prompts, completions, 1.0))
            tokens += sum(map(len, completions))
    return nats, tokens


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Token ids of a completion -> its text, without special tokens.

    Sentencepiece-like tokenizers take a space off the start of a text, and a completion is no start: it is decoded
    behind a letter where the tokenizer has one that comes back as it was.
    """
    start: list[int] = []
    for letter in string.ascii_letters + string.digits:
        ids = tokenizer(letter, add_special_tokens=False)["input_ids"]
        if ids and tokenizer.decode(ids, skip_special_tokens=True) == letter:
            start = ids
            break

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode([*start, *ids], skip_special_tokens=True))[1 if start else 0 :]

    return decode


def entropies(
    model: PreTrainedModel,
    transform: HeadTransform,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    temperature: float,
) -> Iterator[float]:
    """For every completion, the sum over its tokens of the entropy, in nats, of the distribution they were drawn from.

    softmax(logits / T), exact, from one forward of the backbone and without logits: with softcap c and scale s,
    logits / T = c / T · tanh(s / T · x / (c / T)). Logits are fp32, where a bf16 model's generate rounds them first.
    """
    inner, head = bare(model), head_of(bare(model))
    # padded on the right: positions count from each prompt's start, and no token sees the padding
    texts = [(prompt + completion)[:-1] for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=model.device)
    hidden: Tensor = backbone_of(inner)(input_ids=ids, use_cache=False).last_hidden_state
    rows = [
        number * width + len(prompt) - 1 + step
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        for step in range(len(completion))
    ]
    scored = hidden.flatten(0, 1)[torch.tensor(rows, device=hidden.device)]
    labels = torch.tensor([token for tokens in completions for token in tokens], device="cpu")
    result = linear_logp(
        scored.to(head.weight),
        head.weight,
        labels,
        bias=head.bias,
        softcap=None if transform.softcap is None else transform.softcap / temperature,
        logit_scale=transform.logit_scale / temperature,
    )
    for part in result.entropy.double().cpu().split([len(completion) for completion in completions]):
        yield part.sum().item()


def complete(
    model: PreTrainedModel, prompts: Sequence[list[int]], temperature: float, ends: set[int], **choice: Any
) -> list[list[int]]:
    """A completion of each prompt, up to its end. choice: more of what `generate` takes."""
    choice["do_sample"] = temperature > 0
    if temperature > 0:
        choice |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    generator: Any = bare(model)
    output = generator.generate(input_ids=ids, attention_mask=mask, **choice)
    return [_up_to_the_end(row, ends) for row in output[:, width:].tolist()]


def positions(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def drawing(model: PreTrainedModel) -> Iterator[None]:
    """Let the model draw without dropout; its mode and torch's random state are restored."""
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def own_distribution(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Iterator[set[int]]:
    """Set the model's generation config aside: what a call leaves out, such as penalties, would be taken from it.

    Gives the tokens that end a text: those of that config, and the tokenizer's.
    """
    inner: Any = bare(model)
    original = inner.generation_config
    ends = getattr(original, "eos_token_id", None)
    tokens = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(tokens, default=0)
    inner.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=sorted(tokens) or None
    )
    try:
        yield tokens
    finally:
        inner.generation_config = original


def _up_to_the_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and with the first that ends the text; the rest is padding."""
    stop = next((i for i, token in enumerate(tokens, 1) if token in ends), len(tokens))
    return tokens[:stop]
