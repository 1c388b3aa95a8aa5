"""The program of a completion: the documented table, what comes before the solution, and what does not."""

import time

import pytest

from hdpo_train.evaluation.programs import solution
from tests.train.docstring_table import rows

PROMPT = 'def total(xs):\n    """The sum of xs."""\n'
TEST = "assert total([1, 2]) == 3 and total([]) == 0"
HELPED = """import math
from typing import List

SCALE = 2


def twice(x: float) -> float:
    return SCALE * x


def area(radii: List[float]) -> float:
    \"\"\"Twice the area of circles, whole numbers.\"\"\"
"""
AREA = "def area(radii: List[float]) -> float:\n    return twice(sum(math.floor(r * r * math.pi) for r in radii))\n"


def passes(program: str, test: str) -> bool:
    try:
        exec(f"{program}\n{test}", {})
    except Exception:
        return False
    return True


@pytest.mark.parametrize(("text", "verdict"), rows(solution))
def test_solution_is_what_its_docstring_says(text, verdict):
    assert passes(solution(PROMPT, text, "total"), TEST) is (verdict == "right")
    crlf = text.replace("\n", "\r\n")
    assert solution(PROMPT, crlf, "total") == solution(PROMPT, text, "total")


@pytest.mark.parametrize(
    "prompt",
    [
        HELPED,
        [{"role": "system", "content": "Answer in Python."}, {"role": "user", "content": f"```python\n{HELPED}```"}],
        [{"role": "user", "content": f"Finish this function:\n\n```\n{HELPED}\n```\nThank you!"}],
    ],
)
def test_solution_has_the_prompts_imports_and_helpers(prompt):
    assert passes(solution(prompt, f"```python\n{AREA}```", "area"), "assert area([1, 2]) == 30")


def test_solution_has_the_imports_of_a_prompt_with_prose():
    prompt = [{"role": "user", "content": "Write this:\nfrom typing import List\nimport math\ndef area(radii):"}]
    code = AREA.replace("twice", "2 * ")
    assert passes(solution(prompt, f"```python\n{code}```", "area"), "assert area([1, 2]) == 30")


def test_solution_has_the_other_blocks_definitions_and_not_what_they_do():
    completion = f"""Helpers first:
```python
import functools, math
from typing import List
raise SystemExit("an example")
@functools.cache
def twice(x): return FACTOR * x
example = area([1, 2])
```
```python
{AREA}```
```text
area([1]) is 6.
```
with
```py
FACTOR = 2
def area(radii): return "another"
assert area([1]) == 0
```
"""
    program = solution([{"role": "user", "content": "Circles?"}], completion, "area")
    assert passes(program, "assert area([1, 2]) == 30 and 'example' not in dir()")


def test_solution_takes_the_first_answer():
    right, wrong = (f"```python\ndef total(xs): return {what}\n```\n" for what in ("sum(xs)", "0"))
    assert passes(solution(PROMPT, f"{right}or slower:\n{wrong}", "total"), TEST)
    assert not passes(solution(PROMPT, f"{wrong}or faster:\n{right}", "total"), TEST)
    assert passes(solution(PROMPT, f"    return sum(xs)\n```\nor:\n{wrong}", "total"), TEST)
    assert passes(solution(PROMPT, f"    return sum(xs)\n{wrong}", "total"), TEST)


def test_solution_keeps_future_imports_first_and_the_indentation_of_code():
    body = "def total(xs: Missing):\n    if xs:\n        return sum(xs)\n    return 0\n"
    code = f"from __future__ import annotations\n{body}"
    assert passes(solution("import math\n" + PROMPT, f"```python\n{code}```", "total"), TEST)
    assert passes(solution([], "- So:\n\n  ~~~~ python\n" + "  ".join(["", *code.splitlines(True)]), "total"), TEST)


@pytest.mark.parametrize(
    "text", ["x = '\0'", "```python\n\ud800\n```", "total = " + "(" * 5000, "total = " + "-" * 9999]
)
def test_solution_of_what_python_cannot_read_is_wrong(text):
    for prompt in (PROMPT, []):
        program = solution(prompt, text, "total")
        with pytest.raises((SyntaxError, ValueError, MemoryError, RecursionError, AssertionError, NameError)):
            exec(f"{program}\n{TEST}", {})


@pytest.mark.parametrize("piece", ["```\n", "```python\n", " ", "\n", "x\n", "def total(\n", "@a\n", "~", "import a\n"])
def test_solution_takes_time_in_proportion_to_the_text(piece):
    text = piece * (30_000 // len(piece)) + "x"
    start = time.process_time()
    solution(PROMPT, text, "total"), solution([], text, "total")
    assert time.process_time() - start < 3
