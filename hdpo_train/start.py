"""How a run starts: an untrained policy at α = 1 gives exactly its reference, or the run is refused with the reason.

    lengths ────────────> what the model has no positions for is refused, what makes its log-probs vary is said
    the shortest pairs ─> is the reference the base model alone?                         adapter on and off: same bits
                      └─> does training compute what evaluation does?                    training mode, several seeds
                      └─> are the reference's log-probs, read or computed, its own?      computed once more

The shortest pairs of the run stand for all: a model that is random, or another one than its reference, is so for any
tokens. At other α the untrained policy has a margin, which the reference's log-probs give: a large one is warned of.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hdpo_kernels.objectives import ONE
from hdpo_kernels.pair import PairOptions, initial_margins
from hdpo_train.config import HDPOConfig
from hdpo_train.data.own_reference import COLUMNS
from hdpo_train.data.tokenize import PairCollator, pair_lengths, tokenize_pairs
from hdpo_train.model.head import bare, head_of, model_inputs, whole_shape
from hdpo_train.model.loading import evaluating, max_positions, varies_beyond
from hdpo_train.ranks import as_in_training, gathered
from hdpo_train.reference import with_reference

logger = logging.get_logger(__name__)
_PAIRS = 4  # that stand for all
_SEEDS = 8  # enough to see a layer that is left out now and then
_ROUNDING = 1e-5  # of a log-prob, nats: fp32 sums of a handful of tokens
# Beyond it, an average pair pulls with less than 0.27 or more than 0.73 of its full force, σ(−z), where DPO starts with
# 0.5; of hinge it does not pull at all.
_LARGE_MARGIN = 1.0
# Two layouts of the same pairs differ by rounding alone. Of that difference, the largest over eight sequences, so much
# is allowed for: between modes, which run the same batch, and between batches.
_BETWEEN_MODES, _BETWEEN_BATCHES = 2, 10


@dataclass
class Tokenized:
    """Makes data sets of token ids, each checked against the models that will see it. longest: tokens of a sequence."""

    tokenizer: PreTrainedTokenizerBase
    args: HDPOConfig
    models: list[PreTrainedModel]
    longest: int = 0

    def __call__(self, dataset: Dataset, name: str) -> Dataset:
        """Raises ValueError for records that cannot be trained on, and for pairs that are not for these models."""
        args, records = self.args, len(dataset)
        dataset = tokenize_pairs(
            dataset,
            self.tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            on_bad_record=args.on_bad_record,  # type: ignore[arg-type]
            num_proc=args.dataset_num_proc,
            name=name,
        )
        _check_vocabulary(dataset, vocabulary(self.models), name)
        lengths = sequence_lengths(dataset)
        check_lengths(lengths, self.models, name, dropped=len(dataset) < records)
        self.longest = max(self.longest, *lengths)
        return dataset


def vocabulary(models: list[PreTrainedModel]) -> int:
    """The number of entries of the smallest LM head."""
    return min(whole_shape(head_of(model).weight)[0] for model in models)


def _check_vocabulary(dataset: Dataset, vocab: int, name: str) -> None:
    columns = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).iter(batch_size=1000)
    top = max(max(ids) for batch in columns for column in batch.values() for ids in column)
    if top >= vocab:
        raise ValueError(
            f"the {name} set has token id {top}, but the model's head has {vocab} entries: "
            "the tokenizer does not belong to the model, or model.resize_token_embeddings was left out"
        )


def sequence_lengths(dataset: Dataset) -> list[int]:
    """Tokens of the longer sequence of each tokenized pair."""
    return [prompt + max(both) for prompt, *both in pair_lengths(dataset)]


def margins_before_training(dataset: Dataset, options: PairOptions) -> tuple[Tensor, list[str]]:
    """The margin (P,) of each tokenized pair while the policy is its reference, and what to warn of."""
    ref_logps = torch.tensor([dataset[column][:] for column in COLUMNS]).T.flatten()
    lengths = _completion_lengths(dataset)
    margins = initial_margins(ref_logps, lengths, options)
    mean, by_token, warnings = margins.mean().item(), options.alpha_level == "token", []
    if abs(mean) > _LARGE_MARGIN and options.kind == ONE and not options.per_token:
        chosen, rejected = lengths.view(-1, 2).mean(0).tolist()
        other = initial_margins(ref_logps, lengths, replace(options, alpha_level="token")).mean().item()
        instead = (
            f"alpha_level=token, where the margin is {other:+.2f}; pairs of equal length (hdpo-train pairs "
            "--match_lengths); "
        )
        warnings.append(
            f"the margin before training is {mean:+.2f} on average, where DPO starts at 0: the reference's log-probs "
            f"of chosen and rejected ({chosen:.1f} and {rejected:.1f} tokens on average) differ, and alpha = "
            f"{options.alpha:g} weighs that difference. The loss first "
            + ("takes pairs for won, and hardly pushes" if mean > 0 else "pushes hard to make up for it")
            + f". Ways out: {instead if abs(other) < abs(mean) else ''}an alpha nearer to 1; a smaller beta"
        )
    shortest, average = lengths.view(-1, 2).amin(1), lengths.view(-1, 2).mean(1)
    if by_token and (turned := int((shortest < (1 - options.alpha) * average).sum())):
        warnings.append(
            f"in {turned} of {len(margins)} pairs one response is so much shorter than the other that alpha = "
            f"{options.alpha:g} by token gives it a negative weight: there the loss makes a short chosen response less "
            "likely, or a short rejected one more likely. Ways out: leave such pairs out, or an alpha nearer to 1"
        )
    return margins, warnings


def _completion_lengths(dataset: Dataset) -> Tensor:
    """(2P,) tokens of the completions, chosen and rejected in turn."""
    return torch.tensor([both for _, *both in pair_lengths(dataset)]).flatten().float()


def check_lengths(lengths: list[int], models: list[PreTrainedModel], name: str, *, dropped: bool) -> None:
    """Raise ValueError for a pair that is longer than a model's positions; warn of log-probs that vary by batch.

    dropped: some records were left out, so that a pair's number is not its record's.
    """
    longest = max(lengths)
    for model in models:
        most, varies, kind = max_positions(model.config), varies_beyond(model.config), type(model).__name__
        if most is not None and longest > most:
            number = next(i for i, length in enumerate(lengths, 1) if length > most)
            others = sum(length > most for length in lengths) - 1
            raise ValueError(
                f"{'pair' if dropped else 'record'} {number} of the {name} set has a sequence of {lengths[number - 1]} "
                f"tokens{f', and {others} more are too long' if others else ''}, but {kind} has {most} positions: "
                f"give max_length={most} or less, or leave such records out"
            )
        if varies is not None and longest > varies:
            logger.warning(
                f"the {name} set has sequences of up to {longest} tokens. Beyond {varies} tokens the rotary positions "
                f"of {kind} depend on the longest sequence of a batch, and so do all log-probs of that batch: rewards "
                f"of an untrained policy will not be exactly 0. max_length={varies} avoids it"
            )


def with_checked_reference(
    dataset: Dataset,
    policy: nn.Module,
    reference: nn.Module,
    *,
    accelerator: Accelerator,
    collator: PairCollator,
    name: str,
    new_adapter: bool,
    noise: bool,
    **options: Any,
) -> Dataset:
    """`reference.with_reference`, with checks before the pass over the data set and after it.

    new_adapter: this run has given the policy an adapter, and its reference is the policy before training.
    noise: the policy may be random in training mode.
    options: what `with_reference` takes beside.

    Raises ValueError if an untrained policy would not equal its reference.
    """
    brought_along = set(COLUMNS) <= set(dataset.column_names)
    start, without_adapter = Start(dataset, collator, accelerator), False
    with start.ready(policy):
        if new_adapter and not brought_along:
            without_adapter = start.adapter_is_silent(policy)
        if not noise:
            start.check_training_mode(policy)
    dataset = with_reference(
        dataset,
        reference,
        accelerator=accelerator,
        collator=collator,
        name=name,
        without_adapter=without_adapter,
        **options,
    )
    varies = varies_beyond(bare(reference).config)
    if not brought_along and (varies is None or start.longest <= varies):
        with start.ready(reference):
            start.check_reference(dataset, reference, name)
    return dataset


class Start:
    """A few pairs of the run, as a batch of training."""

    def __init__(self, dataset: Dataset, collator: PairCollator, accelerator: Accelerator) -> None:
        lengths = sequence_lengths(dataset)
        self.longest = max(lengths)
        self.pairs = sorted(range(len(lengths)), key=lengths.__getitem__)[:_PAIRS]
        self.accelerator = accelerator
        examples = list(dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).select(self.pairs))
        self._batch = [collator(examples)]
        self._alone = [PairCollator(collator.pad_token_id)([example]) for example in examples]

    @contextlib.contextmanager
    def ready(self, model: nn.Module) -> Iterator[None]:
        """Make a model ready for the calls below: whole, in training's precision. Restores mode and random state."""
        device = self.accelerator.device
        devices = [device] if device.type == "cuda" else []
        with (
            gathered(model),
            evaluating(model),
            as_in_training(model, self.accelerator),
            torch.random.fork_rng(devices=devices),
        ):
            yield

    def adapter_is_silent(self, policy: Any) -> bool:
        """Whether the policy gives the bits of its base model: then that is the reference, whatever the adapter."""
        on = self._logps(policy)
        with policy.disable_adapter():
            return torch.equal(on, self._logps(policy))

    def check_training_mode(self, policy: nn.Module) -> None:
        """Raise ValueError, naming the modules, if the policy is random in training mode."""
        expected = self._logps(policy)
        tolerance = self._tolerance(policy, expected, _BETWEEN_MODES)

        def difference() -> float:
            return max((self._excess(logps, expected, tolerance) for logps in self._draws(policy)), default=0.0)

        policy.train()
        nats = difference()
        policy.eval()
        if not nats:
            return
        random = []
        for kind in dict.fromkeys(type(module) for module in policy.modules()):
            members = {name: module for name, module in policy.named_modules() if type(module) is kind}
            for module in members.values():
                module.training = True
            if difference():
                random.append(f"{kind.__name__} ({next(iter(members))})")
            policy.eval()
        raise ValueError(
            f"{type(bare(policy)).__name__} gives other log-probs in training mode than in evaluation mode, by up to "
            f"{nats:.3g} nats on a short pair, so that an untrained policy would not equal its reference. Modules that "
            f"do it: {', '.join(random) or 'several together'}. Set their options for noise to 0, or train with the "
            "noise: disable_dropout=False"
        )

    def check_reference(self, dataset: Dataset, reference: nn.Module, name: str) -> None:
        """Raise ValueError if the data set's reference log-probs are not those of the reference."""
        expected = self._logps(reference)
        tolerance = self._tolerance(reference, expected, _BETWEEN_BATCHES)
        rows = dataset.select(self.pairs)
        stored = torch.tensor([rows[column][:] for column in COLUMNS]).T.flatten()
        if self._excess(stored, expected, tolerance):
            pair = int((stored - expected).abs().argmax()) // 2
            raise ValueError(
                f"the reference log-probs of pair {self.pairs[pair] + 1} of the {name} set are "
                f"{stored.view(-1, 2)[pair].tolist()}, but the reference model gives "
                f"{expected.view(-1, 2)[pair].tolist()}: if they were cached, delete the cache (--ref_cache_dir)"
            )

    def _draws(self, policy: nn.Module) -> Iterator[Tensor]:
        for seed in range(_SEEDS):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            yield self._logps(policy)
            if torch.equal(before, torch.get_rng_state()):  # what is rare, such as leaving a layer out, is drawn here
                return

    @torch.no_grad()
    def _logps(self, model: nn.Module, batches: list[dict[str, Any]] | None = None) -> Tensor:
        inputs = (model_inputs(batch, self.accelerator.device, {}) for batch in batches or self._batch)
        return torch.cat([model(**each).logps.float().cpu() for each in inputs])

    def _tolerance(self, model: nn.Module, logps: Tensor, times: float) -> Tensor:
        rounding = (self._logps(model, self._alone) - logps).abs().max()
        return times * rounding + _ROUNDING * (1 + logps.abs())

    def _excess(self, logps: Tensor, expected: Tensor, tolerance: Tensor) -> float:
        """The largest difference, nats, if it is more than rounding; else 0. What is not finite is no difference."""
        difference = (logps - expected).abs()
        return float(difference.max()) if bool((difference > tolerance).any()) else 0.0
