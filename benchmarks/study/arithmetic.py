"""A task for the larger study: arithmetic of two to four steps in words. Every answer has many right wordings.

prompt   "Ann has three boxes of four pens. She loses two. She doubles them. How many pens has she?"
answer   " 3 times 4 is 12. Taking 2 from 12 leaves 10. Twice 10 is 20. Answer: 20"
"""

import random
import re

NAMES = ("Ann", "Eva", "Ida", "Joan", "Kate", "Lena", "Mary", "Nora", "Rose", "Sue", "Tess", "Zoe")
THINGS = ("apples", "books", "cards", "coins", "eggs", "nuts", "pens", "plums", "shells", "stamps")
WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBERS = {word: number for number, word in enumerate(WORDS, 2)}
MOST = 99  # the largest number on the way
CHANGES = {  # operation -> how a prompt says it, and how an answer does
    "plus": (("buys {}", "finds {}"), ("{a} plus {b} is {c}", "Adding {b} to {a} gives {c}", "{a} and {b} make {c}")),
    "minus": (("loses {}", "gives away {}"), ("{a} minus {b} is {c}", "Taking {b} from {a} leaves {c}")),
    "double": (("doubles them", "gets as many again"), ("Twice {a} is {c}", "{a} doubled is {c}")),
}
BOXES = ("{a} times {b} is {c}", "{a} boxes of {b} make {c}", "{b} taken {a} times is {c}")
NUM_PROMPTS = 30_000
MAX_NEW_TOKENS, MAX_LENGTH = 40, 96  # tokens, with a vocabulary that has every word
TITLE = "Arithmetic of two to four steps in words"
Step = tuple[str, int, int, int]  # operation, a, b, result


def split_prompts(num_held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out) prompts: no calculation is in both, whoever has whatever things."""
    rng = random.Random(seed)
    prompts = list(dict.fromkeys(_new_prompt(rng) for _ in range(NUM_PROMPTS)))
    held_out: dict[tuple[Step, ...], str] = {}
    for prompt in prompts:
        if len(held_out) < num_held_out:
            held_out.setdefault(tuple(steps(prompt)), prompt)
    return [prompt for prompt in prompts if tuple(steps(prompt)) not in held_out], list(held_out.values())


def demonstrate(prompt: str, rng: random.Random) -> str:
    """A right answer, every step in a wording chosen at random."""
    words = []
    for operation, a, b, c in steps(prompt):
        wordings = BOXES if operation == "boxes" else CHANGES[operation][1]
        words.append(rng.choice(wordings).format(a=a, b=b, c=c))
    return f" {'. '.join(words)}. Answer: {result(prompt)}"


def is_right(prompt: str, answer: str) -> bool:
    """By its last number alone, as GSM8K is judged."""
    last = re.search(r"Answer: ([0-9]{1,9})\.?\s*$", answer)
    return last is not None and int(last[1]) == result(prompt)


def result(prompt: str) -> int:
    return steps(prompt)[-1][3]


def steps(prompt: str) -> list[Step]:
    """The calculation that a prompt tells."""
    start, *changes = prompt.split(". ")[:-1]
    a, b = (NUMBERS[word] for word in re.findall(r"\w+", start) if word in NUMBERS)
    found: list[Step] = [("boxes", a, b, a * b)]
    for change in changes:
        total = found[-1][3]
        number = next((NUMBERS[word] for word in change.split() if word in NUMBERS), total)
        verb = change.removeprefix("She ").split()[0]
        operation = next(name for name, (said, _) in CHANGES.items() if any(s.split()[0] == verb for s in said))
        found.append((operation, total, number, total - number if operation == "minus" else total + number))
    return found


def _new_prompt(rng: random.Random) -> str:
    """One whose numbers stay between 2 and MOST."""
    while True:
        thing = rng.choice(THINGS)
        sentences = [f"{rng.choice(NAMES)} has {rng.choice(WORDS)} boxes of {rng.choice(WORDS)} {thing}"]
        for _ in range(rng.randint(1, 3)):
            said, _ = CHANGES[rng.choice(list(CHANGES))]
            sentences.append(f"She {rng.choice(said).format(rng.choice(WORDS))}")
        prompt = ". ".join([*sentences, f"How many {thing} has she?"])
        if all(2 <= step[3] <= MOST for step in steps(prompt)):
            return prompt
