"""Prompts whose answers a checker knows, and the file that they come from."""

from typing import Any, NamedTuple

from hdpo_train.data.forms import written_rows
from hdpo_train.data.records import load_records


class Problem(NamedTuple):
    """A line of a prompt file: its prompt, text or chat messages, and the whole record."""

    prompt: str | list[dict[str, str]]
    record: dict[str, Any]


def load_problems(name: str, *, prompt_column: str = "prompt", limit: int | None = None) -> list[Problem]:
    """The problems of a .jsonl, .json (also .gz) or .parquet file: in the column of prompts, texts or chat messages.

    limit: so many from the start. Raises FileNotFoundError, or ValueError for a file that is empty or malformed, lacks
    the column, or has something else in it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    dataset = load_records(name)
    if prompt_column not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"{name} has no column {prompt_column!r}, it has {columns}: --prompt_column names the prompts")
    problems = []
    rows = written_rows(dataset.select(range(min(limit or len(dataset), len(dataset)))))
    for number, record in enumerate(rows, 1):
        prompt = record[prompt_column]
        if not isinstance(prompt, str | list):
            raise ValueError(f"{name}, record {number}: {prompt_column} is neither a text nor messages, but {prompt!r}")
        problems.append(Problem(prompt, record))
    if not problems:
        raise ValueError(f"{name} is empty: there is no prompt in it")
    return problems
