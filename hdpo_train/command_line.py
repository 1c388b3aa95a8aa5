"""What all commands of hdpo-train have in common: unknown options, errors, and interruptions.

argv ── Parser ──> options ── command ──> its results
             └── run_command: what a user can cause is one paragraph on stderr, exit code 2
"""

import argparse
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

TRACEBACK_VARIABLE = "HDPO_TRACEBACK"
_HELP = {"-h", "--help"}
_NEGATIVE_NUMBER = re.compile(r"-\.?\d.*")
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


class UsageError(ValueError):
    """A command line, or a file of options, that cannot be meant as it is written."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print the usage and exit, and names the nearest option."""

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        options, rest = self.split(argv)
        if rest:
            raise UsageError(f"{rest[0]!r} belongs to no option ({self.prog} --help lists them)")
        return options

    def split(self, argv: Sequence[str], also: Iterable[str] = ()) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the words that are not theirs. also: names of options that may be among those words."""
        if _HELP & set(argv):
            self.print_help()
            raise SystemExit(0)
        known = [*self._option_string_actions, *also]
        for before, word in zip(["", *argv], argv, strict=False):
            name, _, value = word.partition("=")
            if not word or (word.startswith("--") and word.endswith("=") and not value):
                raise UsageError(f"{name or before or 'an option'} is empty: give it a value, or leave it out")
            is_option = word.startswith("-") and len(word) > 1 and " " not in name
            if is_option and name not in known and not _NEGATIVE_NUMBER.fullmatch(word):
                raise UsageError(f"no option {name}{did_you_mean(name, known)} ({self.prog} --help lists the options)")
        return self.parse_known_args(argv)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            near = did_you_mean(str(value), known) or f"; choose from {', '.join(known)}"
            raise argparse.ArgumentError(action, f"no such choice: {str(value)!r}{near}")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class WideHelp(argparse.RawDescriptionHelpFormatter):
    """A description as it is written, and texts of options beside long names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)


OptionGroup = argparse.ArgumentParser | argparse._ArgumentGroup  # of which a mutually exclusive group is one


def add_option(group: OptionGroup, name: str, text: str, **kwargs: Any) -> None:
    """Add --name, with its default at the end of its text. kwargs: of argparse's add_argument."""
    default = kwargs.get("default")
    if default not in (None, [], ()):
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        text += f" (default: {shown})"
    group.add_argument(f"--{name}", help=text, **kwargs)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" with the nearest of the known words, or nothing where none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_output_dir(name: str, option: str = "--output_dir") -> Path:
    """The folder, which need not exist. Raises ValueError or OSError if nothing can be written there."""
    folder = Path(name)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{option} {folder}: {nearest} is a file, not a folder; choose another name")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {folder}: you may not write to {nearest}; choose another folder")
    return folder


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
    """What to tell a user of an error that a user can cause; None: it is a bug."""
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
    """Those for files and servers that are no ValueError and no OSError."""
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
