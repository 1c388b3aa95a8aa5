"""Checkers: what counts as the answer of a completion, and what is refused."""

import gzip
import json
from fractions import Fraction
from pathlib import Path

import pytest

from hdpo_train.evaluation.answers import chosen_letter, final_number
from hdpo_train.evaluation.checkers import make_checker, unit_test_program
from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.sandbox import Sandbox
from hdpo_train.evaluation.worker import Fault

FOLDER = Path(__file__).parents[4] / "shared" / "data"


def right(spec: str, completion: str, *, prompt: str = "How many?", run_code: bool = False, **record: object) -> bool:
    return make_checker(spec, run_code=run_code)(Problem(prompt, record), completion)


def read(name: str) -> list[dict[str, str]]:
    path = FOLDER / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"real records are not here: {path.name} is looked for in shared/data beside the project")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- gsm8k ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 12", 12),
        ("####12", 12),
        ("A: 12", 12),
        ("A:\n12", 12),
        ("A: 12.", 12),
        ("A: 12.0", 12),
        ("A: 1,234", 1234),
        ("A: 12,345,678.90", Fraction("12345678.9")),
        ("A: $12.50", Fraction("12.5")),
        ("A: £ 3", 3),
        ("A: -3", -3),
        ("A: −3", -3),  # U+2212
        ("A: -$5", -5),
        ("A: $-5", -5),
        ("A: 50%", 50),
        ("A: 3/4", Fraction(3, 4)),
        ("A: .5", Fraction(1, 2)),
        ("A: 1e3", 1000),
        ("**Answer:** 7", 7),
        ("**Answer**: 7", 7),
        (r"The final answer is: $\boxed{7}$.", 7),
        ("the answer is therefore 7, not 8", 7),
        ("A: 12 apples cost $24", 12),  # ambiguous: the first after the marker
        ("A: <<3*4=12>>12", 12),
        ("#### 5\nno:\n#### 6", 6),
        ("USA: 5 apples, 7 pears", 7),  # no marker: the last number
        ("I have 3, then 16 - 3 = 13 apples.", 13),
        ("5-3", None),  # a subtraction that is not worked out
        ("it is...5", 5),
        ("A: twelve, of 13", 13),
        ("12 apples. A: twelve", None),  # a marker, and no number after it
        ("", None),
        ("no idea", None),
        ("A: 1/0", None),
        ("A: " + "9" * 100_000, None),
        ("A: ٣", None),  # a digit, but not of ASCII
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_gsm8k_compares_exactly():
    assert right("gsm8k", "A: 0.1", answer=0.1) and right("gsm8k", "A: 1/10", answer="0.1")
    assert right("gsm8k", "A: 12.00", answer=12) and right("gsm8k", "A: 10000000000000000", answer=1e16)
    assert not right("gsm8k", "A: 10000000000000001", answer=1e16)
    assert not right("gsm8k", "A: 0.333333333333333333333", answer="1/3")
    assert not right("gsm8k", "no number", answer=0)
    assert right("gsm8k", f"A: {10**400}", answer=10**400)  # more than a float holds


def test_gsm8k_truth_may_be_a_solution_in_another_column():
    check = make_checker("gsm8k", answer_column="solution")
    problem = Problem([{"role": "user", "content": "How many?"}], {"solution": "6 * 2 = <<6*2=12>>12\n#### 12"})
    assert check(problem, "It is 12.") and not check(problem, "It is 13.")


@pytest.mark.parametrize("answer", ["twelve", "", True, [12], float("nan"), float("inf")])
def test_gsm8k_refuses_a_truth_without_a_number(answer):
    with pytest.raises(ValueError, match="'How many\\?': no number in its 'answer'"):
        right("gsm8k", "A: 12", answer=answer)


def test_gsm8k_real_solutions_are_right_and_their_neighbours_wrong():
    check = make_checker("gsm8k")
    records = read("gsm8k_sft")
    for record in records:
        prompt, solution = record["prompt"], record["completion"]
        number = solution.split("####")[1].strip()
        assert check(Problem(prompt, {"answer": solution}), solution)
        assert check(Problem(prompt, {"answer": number}), solution)
        assert not check(Problem(prompt, {"answer": int(number.replace(",", "")) + 1}), solution)
    assert len(records) > 7000


def test_gsm8k_agrees_with_the_labels_of_real_preferences():
    check = make_checker("gsm8k")
    for record in read("gsm8k_preferences"):
        problem = Problem(record["prompt"], {"answer": record["chosen"]})
        assert check(problem, record["chosen"])
        assert not check(problem, record["rejected"])


# --- choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ('"B"', "B"),
        ("B) Paris", "B"),
        ("B: Paris", "B"),
        ("B - Paris", "B"),
        ("B because it is larger", "B"),
        ("A because it is larger", "A"),
        ("Answer: B", "B"),
        ("#### B", "B"),
        ("The answer is (B)", "B"),
        ("The answer is A.", "A"),
        ("The answer is option C.", "C"),
        ("Answer: Paris (B)", "B"),
        ("Answer: A\nNo. Answer: B", "B"),
        ("Paris is in France.\n\nB", "B"),
        ("I think (C) is right", "C"),
        ("A cat sat on the mat", None),
        ("The answer is A cat", None),
        ("A-level students", None),
        ("I think so", None),
        ("I'm not sure", None),
        ("So vitamin C.", None),
        ("ABC", None),
        ("(b)", None),
        ("", None),
    ],
)
def test_chosen_letter(text, letter):
    assert chosen_letter(text) == letter


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", 1])
def test_choice_truth_is_a_letter_or_an_index_from_0(answer):
    assert right("choice", "Answer: B", answer=answer)
    assert not right("choice", "Answer: A", answer=answer)
    assert not right("choice", "no idea", answer=answer)


@pytest.mark.parametrize("answer", ["", "1", "Paris", True, -1, 26, 1.0, ["B"]])
def test_choice_refuses_other_truths(answer):
    with pytest.raises(ValueError, match="'answer' must be a letter, or an index from 0"):
        right("choice", "B", answer=answer)


# --- regex ------------------------------------------------------------------------------------------------------------


def test_regex_of_the_spec():
    assert right(r"regex:\bcolou?r:\s*(red|blue)\b", "the color: red")
    assert not right(r"regex:\bcolou?r:\s*(red|blue)\b", "the color: redder")
    assert not right("regex:a.b", "a\nb") and right("regex:(?s)a.b", "a\nb")
    assert right(r"regex:[.]py:f$", "x.py:f")  # a pattern, though it looks like a function


def test_regex_of_the_record():
    assert right("regex", "in 1969.", answer="196[89]") and not right("regex", "in 1970.", answer="196[89]")


def test_regex_refuses_what_is_no_pattern():
    with pytest.raises(ValueError, match=r"checker 'regex:\(': '\(' is not a regular expression"):
        make_checker("regex:(")
    with pytest.raises(ValueError, match=r"problem 'How many\?': '\(' is not a regular expression"):
        right("regex", "x", answer="(")
    with pytest.raises(ValueError, match="'answer' must be a regular expression, not ''"):
        right("regex", "x", answer="")


# --- a function of the user -------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "json.py"  # must not be taken for the library's
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Case:\n"
        "    text: str\n"
        "def ends(prompt, completion, record): return Case(completion).text.endswith(record['end'] + prompt)\n"
        "def number(prompt, completion, record): return 1\n"
        "def broken(prompt, completion, record): return record['missing']\n"
        "value = 3\n"
    )
    return path


def test_function_of_a_file_gets_prompt_completion_and_record(file):
    assert right(f"{file}:ends", "so 12!?", prompt="?", end="!")
    assert not right(f"{file}:ends", "so 12?", prompt="?", end="!")
    assert json.loads("1") == 1


def test_function_of_a_module(file, monkeypatch):
    file.rename(file.with_name("my_checkers_of_a_test.py"))
    monkeypatch.syspath_prepend(file.parent)
    assert right("my_checkers_of_a_test:ends", "12!?", prompt="?", end="!")


def test_function_that_fails_names_the_problem(file):
    with pytest.raises(ValueError, match=r"json.py:broken' raised KeyError\('missing'\) on the problem 'How many\?'"):
        right(f"{file}:broken", "12")
    with pytest.raises(ValueError, match=r"must return a bool, not 1, as it did on the problem 'How many\?'"):
        right(f"{file}:number", "12")


def test_checkers_have_a_time_limit(file):
    file.write_text(f"{file.read_text()}\ndef slow(*_):\n    while True: pass\n")
    for spec, completion in ((f"{file}:slow", ""), ("regex:(a+)+$", "a" * 40 + "!"), ("regex", "a" * 40 + "!")):
        check = make_checker(spec, timeout=0.3)
        with pytest.raises(Fault, match=r"took longer than 0\.3 s on the problem 'How many"):
            check(Problem("How many?", {"answer": "(a|aa)+$"}), completion)
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"timeout of a checker must be a positive .*, not {timeout}"):
            make_checker("gsm8k", timeout=timeout)


def test_unit_tests_sandbox_that_does_not_start_is_a_fault(monkeypatch):
    def fails(sandbox, program):
        raise OSError("out of processes")

    monkeypatch.setattr(Sandbox, "finishes", fails)
    check = make_checker("unit_tests", run_code=True, allow_network=True)
    with pytest.raises(Fault, match="out of processes on the problem") as fault:
        check(Problem(PROMPT, RECORD), "")
    assert fault.value.kind == "the sandbox did not start"


def test_function_refused_at_the_door(file, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("1/0")
    for spec, message in {
        f"{tmp_path / 'absent.py'}:f": "there is no file",
        f"{broken}:f": "broken.py cannot be imported: ZeroDivisionError",
        f"{file}:absent": "has no function 'absent'",
        f"{file}:value": "has no function 'value'",
        "no.such.module:f": "no.such.module cannot be imported: ModuleNotFoundError",
        "json:absent": "json has no function 'absent'",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_checker(spec)


# --- unit tests -------------------------------------------------------------------------------------------------------

PROMPT = 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """The sum of xs."""\n'
TEST = "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n"
RECORD = {"test": TEST, "entry_point": "total"}
WHOLE = "def total(xs):\n    return sum(xs)\n"
CHAT = [{"role": "user", "content": "Write total(xs), the sum of xs."}]


def passes(completion: str, prompt: str | list[dict[str, str]] = PROMPT) -> bool:
    try:
        check = make_checker("unit_tests", run_code=True, timeout=30, memory_mb=256)
    except ValueError as error:
        pytest.skip(str(error))
    return check(Problem(prompt, RECORD), completion)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("    return sum(xs)", True),
        ("    return sum(xs)\n\ndef main(:\n    and so on, cut", True),  # the next thing at the margin is left out
        ("    return sum(xs) + 1", False),
        ("    import sys; sys.exit(0)", False),
        ("    import os; os._exit(0)", False),
        ("    return max(xs)", False),
        ("", False),
        (f"Here it is:\n```python\n{WHOLE}```\nIt adds.", True),
        (f"```python\nprint(total([1]))\n```\nand\n```python\n{WHOLE}```", True),
        (f"```python\n{WHOLE}", True),  # the fence was not closed
        ("```python\ndef total(xs):\n    return 3\n```", False),
    ],
)
def test_unit_tests_complete_a_prompt(completion, expected):
    assert passes(completion) is expected


def test_unit_tests_answer_a_chat():
    assert passes(f"Sure.\n```python\n{WHOLE}```", CHAT)
    assert passes(WHOLE, CHAT)
    assert not passes("I would rather not.", CHAT)


def test_unit_tests_are_run_only_on_request():
    with pytest.raises(ValueError, match=r"runs programs that a model wrote .* run_code=True"):
        make_checker("unit_tests")


def test_unit_tests_hand_their_limits_to_the_sandbox(monkeypatch):
    made = []
    monkeypatch.setattr("hdpo_train.evaluation.checkers.Sandbox", lambda **limits: made.append(limits))
    make_checker("unit_tests", run_code=True, timeout=3, memory_mb=99, allow_network=True)
    assert made == [{"timeout": 3, "memory_mb": 99, "allow_network": True}]
    assert vars(Sandbox(**made[0])) == made[0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"entry_point": "f"}, "has no 'test'; its columns are 'entry_point'"),
        ({"test": "def check(f): pass"}, "has no 'entry_point'"),
        ({"test": "def check(f): pass", "entry_point": "f); import os; (f"}, "must be the name of a function"),
        ({"test": ["assert f()"], "entry_point": "f"}, "'test' must be the text of a program"),
    ],
)
def test_unit_test_program_refuses_other_records(record, message):
    with pytest.raises(ValueError, match=message):
        unit_test_program(Problem("def f():\n", record), "    pass")


# --- the door ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["", "gsm", "regex:", "GSM8K", ":f", "file.py:", "choice2"])
def test_make_checker_refuses_an_unknown_spec(spec):
    near = r"(; did you mean '(gsm8k|choice|regex)'\?)?"
    with pytest.raises(ValueError, match=rf"no such checker: '{spec}'{near}; known are gsm8k"):
        make_checker(spec)


@pytest.mark.parametrize("spec", ["gsm8k", "choice", "regex"])
@pytest.mark.parametrize("record", [{}, {"answer": None}, {"solution": "12"}])
def test_checkers_refuse_a_record_without_the_answer(spec, record):
    with pytest.raises(ValueError, match="the problem 'How many\\?' has no 'answer'; its columns are"):
        right(spec, "12", **record)
