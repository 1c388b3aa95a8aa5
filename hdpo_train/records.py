"""Preference records: where they are loaded from, and the three texts of a record, whatever its form.

    file, folder or hub id ── load_records ──> records ── from_strings, from_messages ──> prompt, chosen, rejected

What is unusable is a BadRecord; what to do about it is the caller's choice.
"""

import glob
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

EMPTY = "chosen or rejected is empty"
_FORMATS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".json.gz": "json", ".parquet": "parquet"}
_ENDINGS = ", ".join(_FORMATS)
_SOURCE = "records of "


class BadRecord(Exception):
    """A record of which no pair can be made; the text is its kind."""


def load_records(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """Load preference records from this machine or from the hub; code that comes with a data set is never run.

    Args:
        name: a .jsonl, .json (also .gz) or .parquet file; a folder of such files; or else a data set id on the hub.
        split: the split, slices such as "train[:100]" included. A file is one split, "train"; the splits of a folder
            are told from its file names (train.jsonl, test.jsonl).
        config: the configuration of a hub data set or folder that has several.

    Raises:
        FileNotFoundError: there is no such file, folder or hub data set, or the folder holds no such file.
        ValueError: the file is empty, malformed (names file and line) or of another type, or has no such split.
    """
    dataset = _find(name, split, config)
    dataset.info.description = _SOURCE + name  # a Dataset does not know its file; messages about it should
    return dataset


def described(dataset: Dataset, name: str) -> str:
    """What to call a data set in a message: by its name, and by its file or hub id where that is known."""
    description = dataset.info.description or ""
    source = description.removeprefix(_SOURCE) if description.startswith(_SOURCE) else ""
    return f"{name} data set ({source})" if source else f"{name} data set"


def _find(name: str, split: str, config: str | None) -> Dataset:
    path = Path(name).expanduser()
    if path.is_file():
        builder = _builder(path)
        if builder is None:
            raise ValueError(f"{path}: a file of records ends in one of {_ENDINGS}")
        if config is not None:
            raise ValueError(f"{path}: a file has no configurations, leave out config={config!r}")
        # data_files takes patterns: a [ in the name would be one
        return _load([path], builder, data_files={"train": glob.escape(str(path.resolve()))}, split=split)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _builder(file))
        if not files:
            raise FileNotFoundError(f"{path}: no file in this folder ends in one of {_ENDINGS}")
        return _load(files, str(path), config, split=split)
    if _builder(path) or name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{path}: no such file or folder (looked for {path.absolute()})")
    try:
        return load_dataset(name, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        message = f"{name!r} is no file or folder here, and could not be had from the hub: {error}"
        raise FileNotFoundError(message) from error


def _builder(path: Path) -> str | None:
    return next((builder for ending, builder in _FORMATS.items() if path.name.lower().endswith(ending)), None)


def _load(files: list[Path], *args: Any, **kwargs: Any) -> Dataset:
    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:  # the readers raise many types, most without the name of the file or the line
        faults = (_json_fault(file) for file in files if _builder(file) == "json")
        where = files[0] if len(files) == 1 else args[0]
        fault = next(filter(None, faults), f"{where} cannot be loaded: {error.__cause__ or error}")
        raise ValueError(fault) from error


def _json_fault(path: Path) -> str | None:
    """What is wrong with the first bad line of a JSON or JSONL file; None if nothing is."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        return f"{path} cannot be read: {error}"
    if content.strip() in (b"", b"[]"):
        return f"{path} is empty: there is no record in it"
    is_array = content.lstrip().startswith(b"[")
    for number, line in enumerate([content] if is_array else content.split(b"\n"), 1):
        try:
            record = json.loads(line if line.strip() else b"{}")
            json.dumps(record, ensure_ascii=False).encode()  # fails on half of a surrogate pair
        except ValueError as error:
            number += getattr(error, "lineno", 1) - 1
            return f"{path}, line {number}: malformed JSON ({getattr(error, 'msg', error)})"
        if not is_array and not isinstance(record, dict):
            return f"{path}, line {number}: a record is an object {{...}}, this is {line[:60].decode()}"
    return None


def from_strings(record: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of a record of strings; without a prompt column, what both begin with is the prompt.

    Raises:
        BadRecord: a value is missing or not a string.
    """
    if not all(isinstance(record.get(column, ""), str) for column in ("prompt", "chosen", "rejected")):
        raise BadRecord("prompt, chosen or rejected is missing or not a string")
    chosen, rejected = record["chosen"], record["rejected"]
    if "prompt" in record:
        return record["prompt"], chosen, rejected
    # The log-probs of a shared start cancel in the loss, so the split may be anywhere in it where a token naturally
    # ends: after a line break, or before the space that belongs to the next word.
    shared = _shared_length(chosen, rejected)
    cut = max(chosen.rfind("\n", 0, shared) + 1, chosen.rfind(" ", 0, shared))
    cut = cut if cut > 0 else shared
    return chosen[:cut], chosen[cut:], rejected[cut:]


def from_messages(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of a record of messages, as the tokenizer's chat template writes them.

    Raises:
        BadRecord: a value is missing or no list of messages, prompt or completion is empty, or the template refuses
            the messages or writes the prompt (with its generation prompt) differently inside the conversation.
    """
    chosen, rejected = _messages(record["chosen"]), _messages(record["rejected"])
    if isinstance(record.get("prompt", ""), str):
        cut = _shared_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        # some data sets have the prompt as a string, next to full conversations
        if "prompt" in record and record["prompt"] not in [message.get("content") for message in prompt]:
            raise BadRecord("the prompt is a string, but not a message that both chosen and rejected begin with")
    else:
        prompt = _messages(record["prompt"])
    if not prompt:
        raise BadRecord("the prompt has no message")
    for completion in (chosen, rejected):
        if not any(value for message in completion for key, value in message.items() if key != "role"):
            raise BadRecord(EMPTY)
    start = _written(prompt, record, tokenizer, add_generation_prompt=True)
    both = [_written(prompt + completion, record, tokenizer) for completion in (chosen, rejected)]
    if not all(text.startswith(start) for text in both):
        raise BadRecord("the chat template writes the prompt differently inside the conversation: use another template")
    return start, both[0][len(start) :], both[1][len(start) :]


def chat_prompt(messages: Any, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt of messages as the tokenizer's chat template writes it, up to where the answer begins.

    Raises:
        BadRecord: messages are no list of messages, or the template refuses them.
    """
    if not (prompt := _messages(messages)):
        raise BadRecord("the prompt has no message")
    return _written(prompt, record, tokenizer, add_generation_prompt=True)


def _written(messages: list[dict[str, Any]], record: dict[str, Any], tokenizer: Any, **kwargs: Any) -> str:
    """By the chat template, with the record's tools and chat_template_kwargs."""
    tools, options = record.get("tools") or None, record.get("chat_template_kwargs") or {}
    options = {key: value for key, value in options.items() if value is not None} | {"tokenize": False} | kwargs
    try:
        options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
        return str(tokenizer.apply_chat_template(messages, **options))
    except (TemplateError, TypeError, ValueError) as error:
        raise BadRecord(f"the chat template refuses the messages or tools ({error})") from error


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str | list | None)
        and any(value is not None for key, value in message.items() if key != "role")
        for message in value
    ):
        raise BadRecord("prompt, chosen or rejected is missing or not a list of {role, content} messages")
    # Arrow gives a message the keys of all messages of its column, so that the same message may differ in chosen and
    # rejected; and a template may ask whether a key is there
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def _shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of what a and b both begin with, at most so much that something is left of each."""
    limit = max(min(len(a), len(b)) - 1, 0)
    return next((i for i in range(limit) if a[i] != b[i]), limit)
