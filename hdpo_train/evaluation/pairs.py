"""Preference pairs of a model's own answers: to one prompt, a right answer is preferred to a wrong one.

samples ── judge_samples ──> Judged: each prompt's different answers, right or wrong ── draw_pairs ──> pairs
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tqdm.auto import tqdm

from hdpo_train.evaluation.checkers import Checker
from hdpo_train.evaluation.evaluate import verdicts
from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.samples import Sample
from hdpo_train.evaluation.worker import Fault


class Pair(NamedTuple):
    prompt: int  # which, from 0
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Judged:
    """The answers that pairs can be made of: each once, whole and judged."""

    right: list[dict[str, bool]]  # of every prompt: answer -> is it right?
    lengths: list[dict[str, int]]  # of the same answers
    unit: str  # of these: tokens, or characters where a sample does not tell its tokens
    left_out: Counter[str]  # samples, by reason
    faults: Counter[str]  # those of them that could not be judged, by the checker's reason

    def prompts(self, *verdicts: bool) -> int:
        """Number of prompts that have answers of each of these verdicts, and no others."""
        return sum(set(each.values()) == set(verdicts) for each in self.right)


def judge_samples(problems: Sequence[Problem], checker: Checker, samples: Sequence[Sample], name: str) -> Judged:
    """Judge those samples that pairs can be made of. name: what to call them in the progress bar.

    An answer that was cut at max_new_tokens is left out: in training it would get an end that its model did not write.
    So are an empty one, one that was there before, and one that the checker cannot judge.
    """
    groups: list[list[Sample]] = [[] for _ in problems]
    for sample in samples:
        groups[sample.prompt].append(sample)
    right: list[dict[str, bool]] = []
    whole: list[dict[str, Sample]] = []
    left_out: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    with tqdm(total=len(samples), desc=f"Judging, {name}", unit="sample", leave=False) as progress:
        for number, (problem, group) in enumerate(zip(problems, groups, strict=True), 1):
            different: dict[str, Sample] = {}
            for sample in group:
                if sample.ended is False:
                    left_out["cut"] += 1
                elif not sample.completion:
                    left_out["empty"] += 1
                elif different.setdefault(sample.completion, sample) is not sample:
                    left_out["repeated"] += 1
            found = verdicts(checker, problem, different, number)
            faults.update(verdict.kind for verdict in found.values() if isinstance(verdict, Fault))
            right.append({answer: verdict for answer, verdict in found.items() if not isinstance(verdict, Fault)})
            whole.append(different)
            progress.update(len(group))
    left_out["unjudged"] = faults.total()
    known = all(sample.num_tokens for different in whole for sample in different.values())
    lengths = [
        {answer: (known and different[answer].num_tokens) or len(answer) for answer in judged}
        for judged, different in zip(right, whole, strict=True)
    ]
    return Judged(right, lengths, "tokens" if known else "characters", left_out, faults)


def draw_pairs(
    right: Sequence[Mapping[str, bool]],
    per_prompt: int,
    seed: int,
    lengths: Sequence[Mapping[str, int]] | None = None,
    largest_difference: float = 1.0,
) -> list[Pair]:
    """At most per_prompt pairs of each prompt, drawn at random and in random order; no answer is used twice.

    Args:
        right: of every prompt, its different answers: is it right?
        per_prompt: most pairs of a prompt.
        seed: the same seed and answers give the same pairs.
        lengths: of the same answers. With them, right and wrong answers are paired that are nearest in length: of all
            combinations first the nearest one, then the nearest of the answers that are left, and so on.
        largest_difference: leave out pairs whose lengths differ by more than this share of the longer one.
    """
    rng = random.Random(seed)
    pairs = []
    for prompt, of_prompt in enumerate(right):
        answers = sorted(of_prompt)
        rng.shuffle(answers)
        chosen, rejected = ([each for each in answers if of_prompt[each] is verdict] for verdict in (True, False))
        couples: Iterable[tuple[str, str]] = zip(chosen, rejected, strict=False)
        if lengths is not None:
            couples = _nearest(chosen, rejected, lengths[prompt], largest_difference)
        pairs += [Pair(prompt, *couple) for couple in itertools.islice(couples, per_prompt)]
    rng.shuffle(pairs)
    return pairs


def _nearest(
    right: list[str], wrong: list[str], lengths: Mapping[str, int], largest_difference: float
) -> Iterator[tuple[str, str]]:
    """Couples of a right and a wrong answer, the nearest in length first, each answer once."""

    def difference(couple: tuple[str, str]) -> int:
        return abs(lengths[couple[0]] - lengths[couple[1]])

    used: set[str] = set()
    for couple in sorted(itertools.product(right, wrong), key=difference):
        longer = max(lengths[answer] for answer in couple)
        if used.isdisjoint(couple) and difference(couple) <= largest_difference * longer:
            used.update(couple)
            yield couple
