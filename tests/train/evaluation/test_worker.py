"""Code of a user's that raises, exits, hangs, crashes: only the one question has no answer."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from hdpo_train.evaluation import worker
from hdpo_train.evaluation.worker import Fault, Worker

FUNCTIONS = """
import os, signal, subprocess, sys, time
calls = []
class Odd(Exception):
    def __repr__(self): raise KeyError
class NumPys:  # what stands for numpy.bool_
    def __bool__(self): return True
NumPys.__name__ = "bool_"
def judge(word):
    calls.append(word)
    print("for a person to read, not an answer", flush=True)
    if word == "raise": 1 / 0
    if word == "odd": raise Odd
    if word == "sys.exit": sys.exit(0)
    if word == "interrupt": raise KeyboardInterrupt
    if word == "recursion": judge_again = lambda: judge_again(); judge_again()
    if word == "os._exit": os._exit(3)
    if word == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if word == "text": return "yes"
    if word == "none": return None
    if word == "loop":
        subprocess.Popen(["sleep", os.environ["HDPO_TEST_SECONDS"]])
        while True: pass
    if word == "input": input()
    if word == "count": return len(calls) == 3
    return NumPys() if word == "numpy" else word == "right"
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    monkeypatch.setenv("HDPO_TEST_SECONDS", f"58.{os.getpid()}")
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    made = Worker("checker 'x'", str(tmp_path / "functions.py"), "judge", 1.0)
    made.start()
    return made


def test_worker_answers_many_questions_with_one_process(judge):
    assert [judge.ask(word) for word in ("right", "wrong", "count", "numpy")] == [True, False, True, True]
    start = time.monotonic()
    assert all(judge.ask("right") for _ in range(1000))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("word", "kind", "what"),
    [
        ("raise", "raised ZeroDivisionError", "raised ZeroDivisionError('division by zero')"),
        ("odd", "raised Odd", "raised Odd"),
        ("sys.exit", "raised SystemExit", "raised SystemExit(0)"),
        ("interrupt", "raised KeyboardInterrupt", "raised KeyboardInterrupt()"),
        ("recursion", "raised RecursionError", "raised RecursionError("),
        ("input", "raised EOFError", "raised EOFError("),
        ("os._exit", "ended its process (exit code 3)", "ended its process (exit code 3)"),
        ("crash", "ended its process (SIGSEGV)", "ended its process (SIGSEGV)"),
        ("text", "returned str, not a bool", "must return a bool, not 'yes'"),
        ("none", "returned NoneType, not a bool", "must return a bool, not None"),
        ("loop", "took longer than 1 s", "took longer than 1 s"),
    ],
)
def test_worker_fault_is_of_one_question(word, kind, what, judge):
    with pytest.raises(Fault) as fault:
        judge.ask(word)
    assert fault.value.kind == f"the checker {kind}" and fault.value.what.startswith(f"checker 'x' {what}")
    assert judge.ask("right") is True and judge.ask("wrong") is False


def ended(argument: str) -> bool:
    """No process has this argument any more; one that was killed may take a moment to go."""
    deadline = time.monotonic() + 30
    while running(argument):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def running(argument: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument.encode() in path.read_bytes().split(b"\0"):
                return True
        except OSError:  # it ended
            continue
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_worker_is_interrupted_at_once_and_forgets_the_question(judge):
    judge.timeout = 60.0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs in the background ignore it
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        judge.ask("loop")
    assert time.monotonic() - start < 20 and ended(os.environ["HDPO_TEST_SECONDS"])
    assert judge.ask("right") and not judge.ask("wrong")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_worker_that_is_stopped_takes_along_what_the_function_started(judge):
    with pytest.raises(Fault):
        judge.ask("loop")
    assert ended(os.environ["HDPO_TEST_SECONDS"])


def test_worker_ends_with_its_owner():
    search = Worker("x", "re", "search", 30.0)
    assert search.ask("a", "a")
    process = search._process
    del search
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is not None


def test_worker_that_cannot_start(tmp_path, monkeypatch):
    path = tmp_path / "functions.py"
    for text, message in {
        "import sys; sys.exit()": r"functions.py cannot be imported: SystemExit\(\)",
        "import os; os._exit(0)": "its import ends the process",
        "def f(: pass": "cannot be imported: SyntaxError",
        "judge = 3": "has no function 'judge'",
        "while True: pass": r"not imported after 0\.5 s",
    }.items():
        path.write_text(text)
        monkeypatch.setattr(worker, "_START_SECONDS", 0.5 if "while" in text else 60)
        with pytest.raises(ValueError, match=message):
            Worker("x", str(path), "judge", 1.0).start()


def test_worker_regular_expression_that_backtracks_for_ever_is_a_fault():
    search = Worker("the regular expression", "re", "search", 0.5)
    with pytest.raises(Fault, match=r"the regular expression took longer than 0\.5 s"):
        search.ask("(a+)+$", "a" * 40 + "!")
    assert search.ask("(a+)+$", "aaa") and not search.ask("b", "aaa")
