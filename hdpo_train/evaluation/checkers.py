"""Is a completion right? A checker is made from a spec, once, and called for every sample.

spec ── make_checker ──> Checker: (problem, completion) -> bool

gsm8k                   the final number of a solution
choice                  the letter of multiple choice
regex:PATTERN, regex    a regular expression, of the spec or of the record, in hdpo_train.evaluation.worker
file.py:f, module:f     a function of yours: f(prompt, completion, record) -> bool, in hdpo_train.evaluation.worker
unit_tests              tests of the record (HumanEval's columns), run in hdpo_train.evaluation.sandbox
"""

import math
import re
import reprlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hdpo_train.evaluation.answers import chosen_letter, final_number
from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.programs import solution
from hdpo_train.evaluation.sandbox import Sandbox
from hdpo_train.evaluation.worker import Fault, Worker
from hdpo_train.parser import did_you_mean

logger = logging.get_logger(__name__)


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
        timeout: seconds that a program, function or regular expression may take for one completion.
        memory_mb: MiB of address space a process of it may have.
        allow_network: run programs where the kernel gives no namespaces, with less protection (see `Sandbox`).

    A program that exceeds its time is wrong. Functions and regular expressions run in a process of their own, which is
    kept from one completion to the next.

    Raises:
        ValueError: an unknown spec, a pattern or function that cannot be used, a timeout out of range, or unit_tests
            without run_code, or on another system than Linux. The checker itself raises it for a record without the
            right answer, or one that cannot be read; and its subclass Fault where one completion cannot be judged: the
            function raises, exits, takes too long or returns no bool.
    """
    kind, _, rest = spec.partition(":")
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"the timeout of a checker must be a positive number of seconds, not {timeout}")
    if spec == "gsm8k":
        return lambda problem, completion: final_number(completion) == _true_number(problem, answer_column)
    if spec == "choice":
        return lambda problem, completion: chosen_letter(completion) == _true_letter(problem, answer_column)
    if kind == "regex" and rest:
        _check_pattern(rest, f"checker {spec!r}")
        search = Worker(f"checker {spec!r}", "re", "search", timeout)
        return lambda problem, completion: _judged(search, problem, rest, completion)
    if spec == "regex":
        search = Worker("the regular expression", "re", "search", timeout)
        return lambda problem, completion: _judged(search, problem, _true_pattern(problem, answer_column), completion)
    if spec == "unit_tests":
        if not run_code:
            raise ValueError(
                "unit_tests runs programs that a model wrote on this machine, without network and within limits of "
                "time and memory, but with your rights to files: run_code=True (--run_code) allows it"
            )
        sandbox = Sandbox(timeout=timeout, memory_mb=memory_mb, allow_network=allow_network)
        if not allow_network and sandbox.shows_processes:
            logger.warning("programs of a model see which processes run here: this kernel cannot give them a /proc")
        return _unit_test_checker(sandbox)
    if kind and rest and kind != "regex":
        return _function_checker(spec, timeout)
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


def _true_pattern(problem: Problem, column: str) -> str:
    pattern = _field(problem, column)
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"{_named(problem)}: {column!r} must be a regular expression, not {pattern!r}")
    _check_pattern(pattern, _named(problem))
    return pattern


def _check_pattern(pattern: str, whose: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{whose}: {pattern!r} is not a regular expression: {error}") from error


# --- a function of the user -------------------------------------------------------------------------------------------


def _function_checker(spec: str, timeout: float) -> Checker:
    where, _, name = spec.rpartition(":")
    if where.endswith(".py"):
        path = Path(where).expanduser()
        if not path.is_file():
            raise ValueError(f"checker {spec!r}: there is no file {path}")
        where = str(path)
    worker = Worker(f"checker {spec!r}", where, name, timeout)
    worker.start()  # what cannot be imported is refused at the door
    return lambda problem, completion: _judged(worker, problem, problem.prompt, completion, problem.record)


def _judged(worker: Worker, problem: Problem, *question: Any) -> bool:
    try:
        return worker.ask(*question)
    except Fault as fault:
        raise Fault(fault.kind, fault.what, f" on {_named(problem)}") from None


# --- unit tests -------------------------------------------------------------------------------------------------------


def _unit_test_checker(sandbox: Sandbox) -> Checker:
    def check(problem: Problem, completion: str) -> bool:
        program = unit_test_program(problem, completion)
        try:
            return sandbox.finishes(program)
        except OSError as error:
            raise Fault("the sandbox did not start", str(error), f" on {_named(problem)}") from error

    return check


def unit_test_program(problem: Problem, completion: str) -> str:
    """The program that ends without an error if the completion is right: solution, tests, `check(entry_point)`.

    The record has HumanEval's columns `test` (defines `check`) and `entry_point` (the function's name). For what of the
    completion is the solution, see `hdpo_train.evaluation.programs.solution`.
    """
    test, entry_point = _field(problem, "test"), _field(problem, "entry_point")
    if not isinstance(test, str):
        raise ValueError(f"{_named(problem)}: 'test' must be the text of a program, not {reprlib.repr(test)}")
    if not isinstance(entry_point, str) or not entry_point.isidentifier():
        raise ValueError(f"{_named(problem)}: 'entry_point' must be the name of a function, not {entry_point!r}")
    return f"{solution(problem.prompt, completion, entry_point)}\n{test}\ncheck({entry_point})\n"
