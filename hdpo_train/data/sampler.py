"""Micro-batches under a budget of tokens instead of a number of pairs."""

import math
import random
from collections.abc import Callable, Iterator
from itertools import accumulate

from torch.utils.data import Sampler
from transformers.utils import logging

logger = logging.get_logger(__name__)
_STEPS_PER_OCTAVE = 16


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of pairs of similar length, at most `max_tokens` and `max_pairs` each; every pair once per epoch.

    Pairs are sorted by length, in steps of sixteen per octave, and this list is cut into batches once. An epoch
    shuffles the pairs of each step among each other, and the order of the batches: all epochs have the same number of
    batches, which the learning rate's schedule and resuming count on, and none exceeds the budget. A pair that is
    longer than the budget is a batch of its own.

    lengths: tokens of each pair (`Layout.tokens`). padded: a batch takes as much as its longest pair, times its pairs.
    ranks: consecutive batches go to different processes. To make their number a multiple of it, the batches with most
        pairs are cut in two; if there are only single pairs left, some of them are taken twice, with a warning.
    epoch: called at the start of each iteration. (seed, epoch) decide the batches, whatever was drawn before.
    """

    def __init__(
        self,
        lengths: list[int],
        max_tokens: int,
        *,
        max_pairs: int,
        padded: bool = False,
        ranks: int = 1,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self.ranks, self.seed, self.epoch = ranks, seed, epoch
        self.steps = [math.ceil(math.log2(length) * _STEPS_PER_OCTAVE) for length in lengths]
        longest = dict(sorted(zip(self.steps, lengths, strict=True)))  # of each step: what its pairs count as
        self.sizes = _cut([longest[step] for step in sorted(self.steps, reverse=True)], max_tokens, max_pairs, padded)
        if self.sizes.count(max_pairs) > len(self.sizes) / 2:
            logger.warning(
                f"{self.sizes.count(max_pairs)} of {len(self.sizes)} micro-batches end at {max_pairs} pairs, not at "
                f"max_tokens_per_batch={max_tokens}: raise per_device_train_batch_size to fill them"
            )
        while len(self.sizes) % ranks and max(self.sizes) > 1:
            at = self.sizes.index(max(self.sizes))
            self.sizes[at : at + 1] = [math.ceil(self.sizes[at] / 2), self.sizes[at] // 2]
        self.repeats = -len(self.sizes) % ranks
        if self.repeats:
            logger.warning(
                f"{self.repeats} of {len(lengths)} pairs are taken twice an epoch, to fill {ranks} processes"
            )

    def __len__(self) -> int:
        return len(self.sizes) + self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        shuffle = random.Random(f"{self.seed} {self.epoch()}")
        pairs = iter(sorted(range(len(self.steps)), key=lambda pair: (-self.steps[pair], shuffle.random())))
        batches = [[next(pairs) for _ in range(size)] for size in self.sizes]
        batches += [batches[at % len(batches)] for at in range(self.repeats)]
        # neighbours are alike: the processes take them at the same time
        groups = [batches[at : at + self.ranks] for at in range(0, len(batches), self.ranks)]
        shuffle.shuffle(groups)
        return (batch for group in groups for batch in group)


def _cut(lengths: list[int], max_tokens: int, max_pairs: int, padded: bool) -> list[int]:
    """Sizes of the batches that the lengths, from the longest to the shortest, are cut into."""
    sums, sizes, start = [0, *accumulate(lengths)], [], 0
    while start < len(lengths):
        size = 1
        while start + size < len(lengths) and size < max_pairs:
            tokens = lengths[start] * (size + 1) if padded else sums[start + size + 1] - sums[start]
            if tokens > max_tokens:
                break
            size += 1
        sizes.append(size)
        start += size
    return sizes
