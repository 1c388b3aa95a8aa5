"""Code of a user's that judges completions, in a process of its own: it may raise, exit, crash or hang there.

    question ── Worker.ask ──> a Python process that stays for the next question ──> a bool, or a Fault

Only the standard library is imported there before that code is, so that a process is up within a moment. It is killed
when it takes too long, and another one starts with the next question. It ends with this process, however that ends.
"""

import inspect
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any

from hdpo_train.evaluation.sandbox import ends_with_this_process

_START_SECONDS = 300.0  # a user's module may load a model of its own


class Fault(ValueError):
    """A completion cannot be judged.

    kind: what is counted, the same for faults alike. what: the same with its details. where: on which record.
    """

    def __init__(self, kind: str, what: str, where: str = "") -> None:
        super().__init__(what + where)
        self.kind, self.what = kind, what


class Worker:
    """A function of a file or module, or `re.search`, in a process of its own.

    Args:
        name: what to call it in messages.
        where: the file, ending in .py, or the module; "re" for `re.search`.
        function: its name.
        timeout: seconds an answer may take.
    """

    def __init__(self, name: str, where: str, function: str, timeout: float) -> None:
        self.name, self.timeout = name, timeout
        self._job = (where, function)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises ValueError where the function cannot be had."""
        # Output of the function goes where this process's errors go: standard output is for answers.
        self._process = subprocess.Popen(
            [*ends_with_this_process(), sys.executable, "-c", _SOURCE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process, which ends that one
        )
        self._end = weakref.finalize(self, _kill, self._process)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()
        self._send((sys.path, *self._job))
        try:
            answer = json.loads(self._lines.get(timeout=_START_SECONDS) or '{"broken": "its import ends the process"}')
        except queue.Empty:
            answer = {"broken": f"{self._job[0]} is not imported after {_START_SECONDS:g} s"}
        if "broken" in answer:
            self._end()
            raise ValueError(f"{self.name}: {answer['broken']}")

    def ask(self, *question: Any) -> bool:
        """What the function returns of these arguments. Raises Fault where it does not return a bool in time."""
        if self._process is None or self._process.poll() is not None:
            try:
                self.start()
            except ValueError as error:
                raise Fault("the checker could not be started again", str(error)) from error
        try:
            self._send(question)
            line = self._lines.get(timeout=self.timeout)
        except queue.Empty:
            self._end()
            raise self._fault(f"took longer than {self.timeout:g} s") from None
        except BaseException:  # Ctrl-C: the answer that is on its way must not become that of the next question
            self._end()
            raise
        if not line:
            self._end()
            raise self._fault(f"ended its process ({_ending(self._process)})")
        answer = json.loads(line)
        if "raised" in answer:
            raise self._fault(f"raised {answer['raised']}", f"raised {answer['said']}")
        if "type" in answer:
            kind = f"returned {answer['type']}, not a bool"
            raise self._fault(kind, f"must return a bool, not {answer['said']}, as it did")
        return answer["right"]

    def _fault(self, kind: str, what: str | None = None) -> Fault:
        return Fault(f"the checker {kind}", f"{self.name} {what or kind}")

    def _send(self, question: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            pickle.dump(question, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:  # it ended; so will its answers
            pass


def _read(process: "subprocess.Popen[bytes]", lines: "queue.SimpleQueue[bytes]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(b"")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # and what the function started
        else:
            process.kill()
        process.wait()


def _ending(process: "subprocess.Popen[bytes] | None") -> str:
    code = process.wait() if process else 0
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _serve() -> None:
    """The program of the process, which gets nothing but the source of this function."""
    import importlib
    import importlib.util
    import json
    import os
    import pickle
    import reprlib
    import sys
    from pathlib import Path

    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def tell(**answer):
        print(json.dumps(answer), file=answers, flush=True)

    def said(value):
        try:
            return repr(value) if isinstance(value, BaseException) else reprlib.repr(value)
        except Exception:  # a __repr__ is the user's code too
            return type(value).__name__

    def load(where, name):
        if where.endswith(".py"):
            alias = f"hdpo_checker_{Path(where).stem}"  # not the stem: a file may be called json.py
            spec = importlib.util.spec_from_file_location(alias, where)
            assert spec is not None and spec.loader is not None  # it ends in .py
            module = sys.modules[alias] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        return getattr(module, name, None)

    sys.path[:], where, name = pickle.load(questions)
    try:
        function = load(where, name)
    except BaseException as error:
        return tell(broken=f"{where} cannot be imported: {said(error)}")
    if not callable(function):
        return tell(broken=f"{where} has no function {name!r}")
    tell(ready=True)
    while True:
        try:
            question = pickle.load(questions)
        except EOFError:
            os._exit(0)
        try:
            right = function(*question)
            if where == "re":
                right = right is not None
        except BaseException as error:
            tell(raised=type(error).__name__, said=said(error))
        else:
            if type(right).__name__ in ("bool", "bool_"):  # NumPy's too
                tell(right=bool(right))
            else:
                tell(type=type(right).__name__, said=said(right))


_SOURCE = f"{inspect.getsource(_serve)}\n_serve()"
