"""Samples from a model's own distribution at given temperatures: batched, seeded, resumable, with their exact entropy.

    problems ── encode ──> prompt ids ── batches of (prompt, temperature, number) ── generate ──> samples

Batches are fixed beforehand, and each has a seed of its own: a call that goes on where another was killed draws what
that one would have drawn, bit for bit on the same machine with the same versions.
"""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.utils import logging

from hdpo_train.data.forms import BadRecord, chat_prompt
from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.samples import Request, Sample, SamplesFile, before_stop, digest
from hdpo_train.model.generation import (
    complete,
    decoder,
    drawing,
    entropies,
    own_distribution,
    positions,
)
from hdpo_train.model.head import HeadTransform, UnsupportedHead, bare, find_transform
from hdpo_train.processes import dealt

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class SamplingOptions:
    """Everything the samples of a model depend on, beside model and prompts.

    Raises ValueError for a value out of range.
    """

    num_samples: int = 16  # of each prompt at each temperature; greedy: one
    temperatures: tuple[float, ...] = (1.0,)  # 0: greedy
    max_new_tokens: int = 256
    batch_size: int = 64  # sequences
    seed: int = 0
    stop: tuple[str, ...] = ()  # a completion ends before the first of these strings; their order does not matter

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be strings that are not empty, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(sorted(set(self.stop))))
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if self.seed < 0:
            raise ValueError(f"seed must be a whole number from 0 on, got {self.seed}")
        if bad := [t for t in self.temperatures if not 0 <= t < math.inf]:
            raise ValueError(f"a temperature must be a number from 0 on, got {bad[0]}")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"a temperature is given twice: {self.temperatures}")


class Sampler:
    """Draws samples of every problem's prompt from one model, at every temperature.

    problems: at least one. name: what to call the model in messages and in the file of samples. entropy: compute it, by
    one more forward of the backbone over prompt and completion.
    Raises ValueError for a prompt without a token, or messages that the tokenizer's chat template refuses.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: PreTrainedTokenizerBase,
        options: SamplingOptions,
        *,
        name: str = "the model",
        entropy: bool = True,
    ) -> None:
        if not problems:
            raise ValueError("there is no prompt to sample from")
        self.tokenizer, self.options, self.name, self.entropy = tokenizer, options, name, entropy
        self.samples: list[Sample] = []  # drawn so far: by temperature, prompt, number
        self._decode = decoder(tokenizer)
        self._prompts = digest([problem.prompt for problem in problems])
        self._prompt_ids = encode(problems, tokenizer)
        self._batches = _batches(len(problems), options)
        self._num_drawn = 0
        self._file: SamplesFile | None = None

    def keep_in(self, path: Path, fingerprint: str) -> None:
        """Go on from the samples in this file, and append those that `run` draws.

        fingerprint: of the model. Raises ValueError if the file is of another model, other prompts or other options.
        """
        header = {
            "name": self.name,
            "model": fingerprint,
            "prompts": self._prompts,
            "prompt_ids": digest(self._prompt_ids),  # changes with the tokenizer and the chat template
            **asdict(self.options),
        }
        if not self.options.stop:
            del header["stop"]  # files from before there were stop strings lack it too
        self._file = SamplesFile(path, header, self._batches)
        self.samples, self._num_drawn = list(self._file.samples), self._file.num_batches

    @property
    def missing(self) -> int:
        """Number of batches that are to be drawn."""
        return len(self._batches) - self._num_drawn

    def run(self, model: PreTrainedModel, processes: PartialState | None = None) -> list[Sample]:
        """Draw what is missing; returns all samples.

        processes: they draw batches in turns, so that every batch is the one that a single process draws. All of them
        call this, and get all samples; the main one appends them to the file.

        Raises ValueError if a prompt and max_new_tokens do not fit the model, FloatingPointError where logits are not
        finite. A head that is not softcap(scale · (h Wᵀ + b)) gives no entropy, and a warning.
        """
        _check_lengths(model, self._prompt_ids, self.options.max_new_tokens)
        transform = _transform_or_warn(model) if self.entropy else None
        is_main = processes is None or processes.is_main_process
        progress = tqdm(
            total=len(self._batches), initial=self._num_drawn, desc=f"Sampling, {self.name}", unit="batch", leave=False
        )
        with (
            progress,
            drawing(model),
            own_distribution(model, self.tokenizer, self.options.max_new_tokens) as ends,
        ):
            numbers = range(self._num_drawn, len(self._batches))
            for samples in dealt(numbers, lambda number: self._draw(model, number, ends, transform), processes):
                if self._file is not None and is_main:
                    self._file.append(samples)
                self.samples += samples
                self._num_drawn += 1
                progress.update()
        return self.samples

    @torch.no_grad()
    def _draw(
        self, model: PreTrainedModel, number: int, ends: set[int], transform: HeadTransform | None
    ) -> list[Sample]:
        batch = self._batches[number]
        temperature = batch[0].temperature
        prompts = [self._prompt_ids[request.prompt] for request in batch]
        torch.manual_seed(_seed(self.options.seed, temperature, number))
        stop = self.options.stop
        stopping = {"stopping_criteria": [_HasStop(self._decode, stop, max(map(len, prompts)))]} if stop else {}
        completions = complete(model, prompts, temperature, ends, **stopping)
        completions = [_up_to_stop(tokens, stop, self._decode) for tokens in completions]
        nats: list[float | None] = [None] * len(batch)
        if transform is not None:
            nats = [*entropies(model, transform, prompts, completions, temperature or 1.0)]
            if bad := [r for r, value in zip(batch, nats, strict=True) if not math.isfinite(value or 0)]:
                raise FloatingPointError(f"{self.name} gives prompt {bad[0].prompt + 1} logits that are not finite")
        samples = []
        for request, tokens, entropy in zip(batch, completions, nats, strict=True):
            text = self._decode(tokens)
            kept = before_stop(text, stop)
            samples.append(Sample(*request, kept, len(tokens), entropy, tokens[-1] in ends or kept != text))
        return samples


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], options: SamplingOptions
) -> list[list[str]]:
    """For every prompt, the texts of its samples."""
    samples = Sampler([Problem(prompt, {}) for prompt in prompts], tokenizer, options, entropy=False).run(model)
    texts: list[list[str]] = [[] for _ in prompts]
    for sample in samples:
        texts[sample.prompt].append(sample.completion)
    return texts


def encode(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts as in training: a string as the tokenizer takes it, messages by its chat template."""
    encoded = []
    for number, (prompt, record) in enumerate(problems, 1):
        is_chat = not isinstance(prompt, str)
        if is_chat and not tokenizer.chat_template:
            raise ValueError(
                f"prompt {number} is of chat messages, but the tokenizer has no chat template: use the tokenizer of a "
                "chat model, or give prompts as strings"
            )
        try:
            text = chat_prompt(prompt, record, tokenizer) if is_chat else prompt
        except BadRecord as error:
            raise ValueError(f"prompt {number}: {error}") from error
        ids = tokenizer(text, add_special_tokens=not is_chat, verbose=False)["input_ids"]
        if ids[-1:] == [tokenizer.eos_token_id] and not str(text).endswith(str(tokenizer.eos_token)):
            ids = ids[:-1]  # of a tokenizer that ends every text; a prompt goes on
        if not ids:
            raise ValueError(f"prompt {number} is empty: there is no token to go on from")
        encoded.append(ids)
    return encoded


class _HasStop(StoppingCriteria):
    """Ends generation where every row has a stop string. It saves time only: what a sample is, `_up_to_stop` decides.

    Unlike the stop strings of `generate`, one that begins in the prompt does not count.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...], start: int) -> None:
        self.decode, self.stop, self.start = decode, stop, start
        self.tail = max(len(text.encode()) for text in stop) + 8  # tokens: few have less than a byte of text

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        completions = input_ids[:, self.start :]
        return torch.tensor([self._stops(row) for row in completions.tolist()], device=input_ids.device)

    def _stops(self, tokens: list[int]) -> bool:
        tail = tokens[-self.tail :]
        return _contains(tail, self.stop, self.decode) and _contains(tokens, self.stop, self.decode)


def _contains(tokens: list[int], stop: tuple[str, ...], decode: Callable[[list[int]], str]) -> bool:
    text = decode(tokens)
    return any(each in text for each in stop)


def _up_to_stop(tokens: list[int], stop: tuple[str, ...], decode: Callable[[list[int]], str]) -> list[int]:
    """The tokens up to the one that completes the first stop string, which counts as an end token does; else all."""
    if not stop or not _contains(tokens, stop, decode):
        return tokens
    shorter = range(1, len(tokens))
    return tokens[: 1 + bisect_left(shorter, True, key=lambda size: _contains(tokens[:size], stop, decode))]


def _batches(num_prompts: int, options: SamplingOptions) -> list[list[Request]]:
    """Samples of one temperature each; those of a prompt together, so that little is padded."""
    batches = []
    for temperature in options.temperatures:
        each = options.num_samples if temperature else 1
        requests = [Request(prompt, temperature, number) for prompt in range(num_prompts) for number in range(each)]
        batches += [requests[i : i + options.batch_size] for i in range(0, len(requests), options.batch_size)]
    return batches


def _seed(seed: int, temperature: float, batch: int) -> int:
    return int(hashlib.sha256(f"{seed} {temperature!r} {batch}".encode()).hexdigest()[:15], 16)


def _check_lengths(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    most = positions(model)
    number = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if most is not None and len(prompts[number]) + max_new_tokens > most:
        raise ValueError(
            f"prompt {number + 1} has {len(prompts[number])} tokens, with max_new_tokens = {max_new_tokens} more than "
            f"the {most} positions of the model: lower max_new_tokens, or leave long prompts out"
        )


def _transform_or_warn(model: PreTrainedModel) -> HeadTransform | None:
    try:
        return find_transform(bare(model))
    except UnsupportedHead as error:
        logger.warning(f"no entropy: {error}")
        return None
