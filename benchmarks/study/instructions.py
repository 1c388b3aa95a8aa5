"""A task for a real chat model: one short sentence about a topic, under one constraint that a program can check.

prompt   "Write one short sentence about winter that contains the word "river"."
answer   "The river froze early this winter."

Training and evaluation have kinds of constraints of their own, so that what is measured is following instructions and
not one of them. Every prompt has many right answers. Left out are kinds that leave SmolLM2-135M-Instruct nothing to
learn from: of 32 samples each, none was right in small or capital letters, and one with two given words.
"""

import itertools
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hdpo_train.evaluation.problems import Problem

SHORTEST, LONGEST = 4, 15  # words of a sentence, whatever its constraint
MAX_NEW_TOKENS = 32
TOPICS = (
    "autumn", "bees", "birds", "boats", "books", "bread", "bridges", "cats", "cities", "clouds", "coffee", "cooking",
    "dancing", "dogs", "dreams", "family", "farming", "fire", "fishing", "forests", "friendship", "gardens", "horses",
    "ice", "islands", "kites", "lakes", "letters", "maps", "markets", "medicine", "money", "mountains", "museums",
    "music", "night", "painting", "planets", "poetry", "rain", "reading", "robots", "sailing", "school", "snow",
    "spiders", "sport", "spring", "stars", "storms", "tea", "time", "trains", "travel", "trees", "whales", "winter",
)  # fmt: skip
WORDS = (
    "always", "beautiful", "bright", "children", "cold", "early", "golden", "happy", "home", "important", "learn",
    "light", "little", "morning", "never", "often", "people", "quiet", "river", "slowly", "small", "strong", "summer",
    "together", "tomorrow", "warm", "water", "window", "wonderful", "world",
)  # fmt: skip


class Kind(NamedTuple):
    """A kind of constraint."""

    says: str  # what a prompt says; {} is its value
    values: Sequence[Any]
    holds: Callable[[str, Any], bool]  # of a sentence and a value


def _words(sentence: str) -> list[str]:
    return re.findall(r"[\w'’-]+", sentence)


def _contains(sentence: str, word: str) -> bool:
    return word in _words(sentence.lower())


TRAINING_KINDS = {
    "keyword": Kind('contains the word "{}"', WORDS, _contains),
    "length": Kind("has at most {} words", (6, 7, 8), lambda said, most: len(_words(said)) <= most),
    "count": Kind("contains exactly {}", ("one comma", "two commas"), lambda s, n: s.count(",") == 1 + ("two" in n)),
    "ending": Kind("ends with {}", ("an exclamation mark", "a question mark"), lambda s, e: s[-1] == "!?"["qu" in e]),
}
EVALUATION_KINDS = {
    "start": Kind('begins with the word "{}"', WORDS, lambda said, word: _words(said.lower())[:1] == [word]),
    "at least": Kind("has at least {} words", (6, 7, 8), lambda said, least: len(_words(said)) >= least),
    "without letter": Kind('does not contain the letter "{}"', "jkvw", lambda s, letter: letter not in s.lower()),
    "without word": Kind(
        'does not contain the word "{}"', ("the", "and", "is", "of"), lambda s, w: not _contains(s, w)
    ),
    "no comma": Kind("does not contain {}", ("a comma", "any comma"), lambda said, _: "," not in said),
}
KINDS = TRAINING_KINDS | EVALUATION_KINDS


def problems(kinds: dict[str, Kind], number: int, seed: int) -> list[Problem]:
    """So many different prompts, as chats, the kinds in turn. Raises ValueError where a kind has not so many."""
    rng = random.Random(seed)
    each = -(-number // len(kinds))
    of_kind = []
    for name, kind in kinds.items():
        asked = rng.sample(list(itertools.product(TOPICS, kind.values)), each)
        of_kind.append([_problem(name, topic, value) for topic, value in asked])
    return [problem for group in zip(*of_kind, strict=True) for problem in group][:number]


def _problem(name: str, topic: str, value: Any) -> Problem:
    text = f"Write one short sentence about {topic} that {KINDS[name].says.format(value)}."
    return Problem([{"role": "user", "content": text}], {"kind": name, "value": value})


def is_right(problem: Problem, completion: str) -> bool:
    """One sentence of SHORTEST to LONGEST words that keeps the problem's constraint."""
    said = completion.strip().strip('"“”').strip()
    one_sentence = re.fullmatch(r"[^.!?\n]+[.!?]", said) is not None
    kept = one_sentence and KINDS[problem.record["kind"]].holds(said, problem.record["value"])
    return kept and SHORTEST <= len(_words(said)) <= LONGEST
