"""What decides whether a completion is right."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Problem(NamedTuple):
    prompt: str | list[dict[str, str]]  # a text, or chat messages
    record: dict[str, Any]  # the whole line of the prompt file


Checker = Callable[[Problem, str], bool]  # (problem, completion) -> is it right?
