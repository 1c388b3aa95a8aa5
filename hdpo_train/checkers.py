"""Is a completion right? A checker is made from a spec, once, and called for every sample.

spec ── make_checker ──> Checker: (problem, completion) -> bool

gsm8k                   the final number of a solution
choice                  the letter of multiple choice
regex:PATTERN, regex    a regular expression, of the spec or of the record
file.py:f, module:f     a function of yours: f(prompt, completion, record) -> bool
unit_tests              tests of the record (HumanEval's columns), run in hdpo_train.sandbox
"""

import importlib
import importlib.util
import math
import re
import reprlib
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from hdpo_train.answers import chosen_letter, final_number
from hdpo_train.command_line import did_you_mean
from hdpo_train.programs import solution
from hdpo_train.sandbox import Sandbox


class Problem(NamedTuple):
    """A line of a prompt file: its prompt, text or chat messages, and the whole record."""

    prompt: str | list[dict[str, str]]
    record: dict[str, Any]


Checker = Callable[[Problem, str], bool]  # (problem, completion) -> is it right?


def make_checker(
    spec: str,
    *,
    answer_column: str = "answer",
    run_code: bool = False,
    timeout: float = 10.0,
    memory_mb: int = 1024,
    allow_network: bool = False,
) -> Checker:
    """The checker a spec names.

    Args:
        spec: one of
            "gsm8k": `final_number` of the completion equals that of the answer column, a number or a whole solution.
            "choice": `chosen_letter` of the completion equals the answer column, a letter or an index (0 is A).
            "regex:PATTERN": `re.search` finds the pattern in the whole completion.
            "regex": the same with the pattern in the answer column.
            "path/to/file.py:function", "package.module:function": called with prompt, completion and record; returns
                a bool.
            "unit_tests": the program and the record's tests run to their end (see `unit_test_program`).
        answer_column: the column of the record that holds the right answer, for gsm8k, choice and regex.
        run_code: allow "unit_tests" to run what the model wrote.
        timeout: seconds a program may run, for "unit_tests".
        memory_mb: MiB of address space a process of it may have.
        allow_network: run programs where the kernel gives no namespaces, with less protection (see `Sandbox`).

    Raises:
        ValueError: an unknown spec, a pattern or function that cannot be used, or unit_tests without run_code, or on
            another system than Linux. The checker itself raises it for a record without the right answer, or one that
            cannot be read, and where the function raises or does not return a bool.
    """
    kind, _, rest = spec.partition(":")
    if spec == "gsm8k":
        return lambda problem, completion: final_number(completion) == _true_number(problem, answer_column)
    if spec == "choice":
        return lambda problem, completion: chosen_letter(completion) == _true_letter(problem, answer_column)
    if kind == "regex" and rest:
        pattern = _compiled(rest, f"checker {spec!r}")
        return lambda problem, completion: pattern.search(completion) is not None
    if spec == "regex":
        return lambda problem, completion: _true_pattern(problem, answer_column).search(completion) is not None
    if spec == "unit_tests":
        if not run_code:
            raise ValueError(
                "unit_tests runs programs that a model wrote on this machine, without network and within limits of "
                "time and memory, but with your rights to files: run_code=True (--run_code) allows it"
            )
        sandbox = Sandbox(timeout=timeout, memory_mb=memory_mb, allow_network=allow_network)
        return lambda problem, completion: sandbox.finishes(unit_test_program(problem, completion))
    if kind and rest and kind != "regex":
        return _function_checker(spec)
    near = did_you_mean(kind, ["gsm8k", "choice", "regex", "unit_tests"])
    raise ValueError(
        f"no such checker: {spec!r}{near}; known are gsm8k, choice, regex:PATTERN, regex, unit_tests, and a function "
        "as path/to/file.py:function or package.module:function"
    )


# --- what the record says is right ------------------------------------------------------------------------------------


def _field(problem: Problem, column: str) -> Any:
    value = problem.record.get(column)
    if value is None:
        raise ValueError(
            f"{_named(problem)} has no {column!r}; its columns are {', '.join(map(repr, problem.record)) or 'none'}"
        )
    return value


def _named(problem: Problem) -> str:
    return f"the problem {reprlib.repr(problem.prompt)}"


def _true_number(problem: Problem, column: str) -> Fraction:
    answer = _field(problem, column)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return Fraction(answer)
    if isinstance(answer, float) and math.isfinite(answer):
        return Fraction(str(answer))  # as it is written: 0.1 is a tenth
    number = final_number(answer) if isinstance(answer, str) else None
    if number is None:
        raise ValueError(f"{_named(problem)}: no number in its {column!r}, {reprlib.repr(answer)}")
    return number


def _true_letter(problem: Problem, column: str) -> str:
    answer = _field(problem, column)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < 26:
        return chr(ord("A") + answer)
    letter = answer.strip().strip("().").upper() if isinstance(answer, str) else ""
    if not re.fullmatch("[A-Z]", letter):
        raise ValueError(f"{_named(problem)}: {column!r} must be a letter, or an index from 0, not {answer!r}")
    return letter


def _true_pattern(problem: Problem, column: str) -> re.Pattern[str]:
    pattern = _field(problem, column)
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"{_named(problem)}: {column!r} must be a regular expression, not {pattern!r}")
    return _compiled(pattern, _named(problem))


def _compiled(pattern: str, whose: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{whose}: {pattern!r} is not a regular expression: {error}") from error


# --- a function of the user -------------------------------------------------------------------------------------------


def _function_checker(spec: str) -> Checker:
    function = _load_function(spec)

    def check(problem: Problem, completion: str) -> bool:
        try:
            right = function(problem.prompt, completion, problem.record)
        except Exception as error:
            raise ValueError(f"checker {spec!r} raised {error!r} on {_named(problem)}") from error
        if not isinstance(right, bool):
            raise ValueError(f"checker {spec!r} must return a bool, not {right!r}, as it did on {_named(problem)}")
        return right

    return check


def _load_function(spec: str) -> Callable[..., Any]:
    where, _, name = spec.rpartition(":")
    path = Path(where).expanduser()
    from_file = path.suffix == ".py"
    if from_file and not path.is_file():
        raise ValueError(f"checker {spec!r}: there is no file {path}")
    try:
        module = _import_file(path) if from_file else importlib.import_module(where)
    except Exception as error:
        raise ValueError(f"checker {spec!r}: {where} cannot be imported: {error!r}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"checker {spec!r}: {where} has no function {name!r}")
    return function


def _import_file(path: Path) -> ModuleType:
    name = f"hdpo_checker_{path.stem}"  # not the stem: a file may be called json.py
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # it ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(module_spec)  # dataclasses look for their module there
    module_spec.loader.exec_module(module)
    return module


# --- unit tests -------------------------------------------------------------------------------------------------------


def unit_test_program(problem: Problem, completion: str) -> str:
    """The program that ends without an error if the completion is right: solution, tests, `check(entry_point)`.

    The record has HumanEval's columns `test` (defines `check`) and `entry_point` (the function's name). For what of the
    completion is the solution, see `hdpo_train.programs.solution`.
    """
    test, entry_point = _field(problem, "test"), _field(problem, "entry_point")
    if not isinstance(test, str):
        raise ValueError(f"{_named(problem)}: 'test' must be the text of a program, not {reprlib.repr(test)}")
    if not isinstance(entry_point, str) or not entry_point.isidentifier():
        raise ValueError(f"{_named(problem)}: 'entry_point' must be the name of a function, not {entry_point!r}")
    return f"{solution(problem.prompt, completion, entry_point)}\n{test}\ncheck({entry_point})\n"
