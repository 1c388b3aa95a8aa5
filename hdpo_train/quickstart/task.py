"""The task: string beads of given colours, in any order. Many right answers, and a program can check them.

prompt   "3 red 1 blue 2 gold:"      answer   " red gold red red blue gold"     (or any of the other 59)
"""

import itertools
import math
import random
from collections import Counter

COLOURS = ("red", "blue", "green", "gold", "black", "white", "pink", "grey")
MOST = 4  # beads of one colour
MAX_NEW_TOKENS = 3 * MOST + 2  # the longest right answer, its end, and one more
MAX_LENGTH = 64  # tokens of prompt and answer, whatever the tokenizer made of the words
TITLE = "Stringing beads of given colours in any order"
STAYS = 0.5  # how often a demonstration takes the same colour again, where it could also change
EXPLANATION = "String beads of the given colours in any order: '{prompt}' has {count} right answers, one is '{answer}'."


def all_prompts() -> list[str]:
    """Every choice of three colours, in order, with one to four beads of each."""
    choices = itertools.permutations(COLOURS, 3)
    return [
        " ".join(f"{n} {colour}" for n, colour in zip(counts, colours, strict=True)) + ":"
        for colours in choices
        for counts in itertools.product(range(1, MOST + 1), repeat=3)
    ]


def split_prompts(num_held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out) prompts: no set of beads is in both, in whatever order its colours are named."""
    prompts = all_prompts()
    random.Random(seed).shuffle(prompts)
    held_out: list[str] = []
    sets: set[frozenset] = set()
    for prompt in prompts:
        if len(held_out) < num_held_out and _beads(prompt) not in sets:
            held_out.append(prompt)
            sets.add(_beads(prompt))
    return [prompt for prompt in prompts if _beads(prompt) not in sets], held_out


def is_right(prompt: str, answer: str) -> bool:
    return Counter(answer.split()) == Counter(dict(_beads(prompt)))


def count_right(prompt: str) -> int:
    """Number of right answers: the orders of the beads, those of one colour being alike."""
    counts = [n for _, n in _beads(prompt)]
    return math.factorial(sum(counts)) // math.prod(math.factorial(n) for n in counts)


def demonstrate(prompt: str, rng: random.Random) -> str:
    """A right answer in random order, which stays with a colour more often than chance would.

    Were all orders equally likely, there would be nothing for a sharper policy to prefer.
    """
    left = Counter(dict(_beads(prompt)))
    answer: list[str] = []
    while +left:
        stays = answer and left[answer[-1]] and rng.random() < STAYS
        answer.append(answer[-1] if stays else rng.choice(sorted(left.elements())))
        left[answer[-1]] -= 1
    return "".join(f" {colour}" for colour in answer)


def _beads(prompt: str) -> frozenset:
    words = prompt.rstrip(":").split()
    return frozenset((colour, int(n)) for n, colour in zip(words[::2], words[1::2], strict=True))
