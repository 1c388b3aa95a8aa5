"""How a command ends: what a user can cause is one paragraph on stderr and exit code 2, all else a traceback."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from hdpo_train.parser import UsageError

TRACEBACK_VARIABLE = "HDPO_TRACEBACK"


# RuntimeErrors of libraries that are no bugs: what their text contains -> what to do
_RUNTIME_ERRORS = {
    "DataLoader worker (pid": "A process that loads data was killed, most often for lack of memory: lower "
    "--dataloader_num_workers, or leave it out.",
    "subprocesses has abruptly died": "A process that prepares data was killed, most often for lack of memory: lower "
    "--dataset_num_proc, or leave it out.",
    "out of memory": "Lower the batch size (training: raise --gradient_accumulation_steps instead) or the lengths; "
    "hdpo-train plan shows what a step needs.",
    "can't allocate memory": "Lower the batch size or the lengths; hdpo-train plan shows what a step needs.",
}


def run_command(name: str, command: Callable[[list[str]], object], argv: list[str]) -> None:
    """command(argv). Ends the program with 2 after an error that a user can cause, and with 130 after Ctrl-C.

    Whatever else is raised is a bug, and keeps its traceback.
    """
    try:
        command(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print(file=sys.stderr)  # below a progress bar
        end(name, str(stop) or "interrupted", 130)
    except BrokenPipeError:  # whoever read the output has gone, as with "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
        raise SystemExit(141) from None
    except Exception as error:
        text = explanation(error)
        if text is None:
            raise
        if _wants_traceback(argv):
            traceback.print_exc()
        elif not isinstance(error, UsageError):
            text += f"\n({TRACEBACK_VARIABLE}=1 in the environment shows where this was raised)"
        end(name, text, 2)


def explanation(error: Exception) -> str | None:
    """What to tell a user of this error; None if no user can cause it, so that it is a bug."""
    text = str(error) or type(error).__name__
    if isinstance(error, ImportError):
        return _missing_package(error)
    if isinstance(error, RuntimeError | MemoryError) and not isinstance(error, RecursionError | NotImplementedError):
        advice = [what for words, what in _RUNTIME_ERRORS.items() if words in text]
        if isinstance(error, MemoryError):
            advice = [_RUNTIME_ERRORS["out of memory"]]
        return f"{text.splitlines()[0]}. {advice[0]}" if advice else None
    if not isinstance(error, (ValueError, OSError, FloatingPointError, *_errors_of_libraries())):
        return None
    if "Original Traceback" in text:  # of a process that loads data: its last line is the error
        text = text.rstrip().rpartition("\n")[2]
    return "\n".join(line for line in text.splitlines() if line.strip())


def _missing_package(error: ImportError) -> str | None:
    package = (error.name or "").partition(".")[0]
    if not package.isidentifier():  # not of an import statement: a library says what it needs
        return " ".join(str(error).split())
    if not isinstance(error, ModuleNotFoundError) or package in ("hdpo_train", "hdpo_kernels"):
        return None
    return f"the package {package} is not installed: pip install 'hdpo[train,peft,eval]', or pip install {package}"


def _errors_of_libraries() -> tuple[type[Exception], ...]:
    """Errors that libraries raise for files and servers, beside ValueError and OSError."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError, StrictDataclassError  # of its HTTP library, whichever that is
    from jinja2 import TemplateError
    from safetensors import SafetensorError
    from yaml import YAMLError

    return DatasetsError, HTTPError, StrictDataclassError, TemplateError, SafetensorError, YAMLError


def _wants_traceback(argv: Sequence[str]) -> bool:
    return bool(os.environ.get(TRACEBACK_VARIABLE)) or "--log_level debug" in " ".join(argv).replace("=", " ")


def end(name: str, message: str, code: int) -> NoReturn:
    """End the program with a message on stderr."""
    print(f"{name}: {message}", file=sys.stderr)
    raise SystemExit(code)
