"""A parser of command lines that names the nearest option where one does not exist."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

HELP = {"-h", "--help"}
_NEGATIVE_NUMBER = re.compile(r"-\.?\d.*")


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
        if HELP & set(argv):
            self.print_help()
            raise SystemExit(0)
        known = [*self._option_string_actions, *also]
        for before, word in zip(["", *argv], argv, strict=False):
            name, _, value = word.partition("=")
            if not word or (word.startswith("--") and word.endswith("=") and not value):
                raise UsageError(f"{name or before or 'an option'} is empty: give it a value, or leave it out")
            is_option = word.startswith("-") and len(word) > 1 and " " not in name
            if is_option and name not in known and not _NEGATIVE_NUMBER.fullmatch(word):
                raise UsageError(self.unknown(name, known))
        return self.parse_known_args(argv)

    def unknown(self, name: str, known: Iterable[str]) -> str:
        """What to say of an option that does not exist."""
        return f"no option {name}{did_you_mean(name, known)} ({self.prog} --help lists the options)"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            near = did_you_mean(str(value), known) or f"; choose from {', '.join(known)}"
            raise argparse.ArgumentError(action, f"no such choice: {str(value)!r}{near}")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class WideHelp(argparse.RawDescriptionHelpFormatter):
    """Keeps a description as it is written, and puts texts of options beside long names."""

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


def is_file_of_options(word: str) -> bool:
    """Whether a word of a command line names a YAML file."""
    return word.endswith((".yaml", ".yml")) and not word.startswith("-")
