"""The three texts of a preference record, whatever its form.

    row of a data set ── as_written ──> record ── from_strings, from_messages ──> prompt, chosen, rejected

What is unusable is a BadRecord; what to do about it is the caller's choice.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, Json, LargeList, List
from transformers import PreTrainedTokenizerBase

EMPTY = "chosen or rejected is empty"
_ASKING = ("system", "developer", "user", "tool")  # roles of messages that are no answer
_SPELLED = re.compile(r"""\[\s*\{\s*['"](role|content)['"]\s*:""")
_MARK = "730591826455"  # contents begin with it where a template is tried
_UNREAD = "91d3unread"  # a key that no template reads

Message = dict[str, Any]


class BadRecord(Exception):
    """A record of which no pair can be made; the text is its kind."""


def as_written(value: Any, feature: Any) -> Any:
    """A value of a data set without the keys that Arrow has added, as None, because other records have them.

    A null that was written on purpose cannot be told from those, and goes with them, unless the feature is Json. Items
    of a list, and columns, stay as they are; so does the content of a message, which calls of tools have as null.
    """
    if value is None:
        return None
    if isinstance(feature, Json):
        return json.loads(value)
    if isinstance(feature, dict):
        kept = ("content",) if "role" in value else ()
        return {k: as_written(part, feature[k]) for k, part in value.items() if part is not None or k in kept}
    if isinstance(feature, List | LargeList):
        return [as_written(part, feature.feature) for part in value]
    return value


def written_rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a data set, each value as it was written (see `as_written`)."""
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for row in table.to_pylist():
            yield {column: as_written(value, dataset.features[column]) for column, value in row.items()}


# ---- strings --------------------------------------------------------------------------------------------------------


def from_strings(record: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of a record of strings; without a prompt column, what both begin with is the prompt.

    Raises:
        BadRecord: a value is missing or not a string, or there is no prompt column and no common beginning.
    """
    for column in ("prompt", "chosen", "rejected"):
        value = record.get(column, "")
        if not isinstance(value, str):
            raise _wrong(column, value, "a string")
        if _SPELLED.match(value):
            raise BadRecord(f"{column} is a string that spells out messages; make it a list of messages")
    chosen, rejected = record["chosen"], record["rejected"]
    if "prompt" in record:
        return record["prompt"], chosen, rejected
    # The log-probs of a shared start cancel in the loss, so the split may be anywhere in it where a token naturally
    # ends: after a line break, or before the space that belongs to the next word.
    shared = _shared_length(chosen, rejected)
    if not shared and chosen and rejected and chosen != rejected:
        raise _no_prompt(record)
    cut = max(chosen.rfind("\n", 0, shared) + 1, chosen.rfind(" ", 0, shared))
    cut = cut if cut > 0 else shared
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _no_prompt(record: dict[str, Any]) -> BadRecord:
    text = "there is no column prompt, and chosen and rejected begin with nothing in common"
    others = ", ".join(column for column in record if column not in ("chosen", "rejected"))
    return BadRecord(f"{text} (the other columns are {others}: rename the one with the prompt)" if others else text)


def _shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning of a and b; something is always left of each."""
    limit = max(min(len(a), len(b)) - 1, 0)
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def _wrong(column: str, value: Any, wanted: str) -> BadRecord:
    return BadRecord(f"{column} is missing" if value is None else f"{column} is {_kind(value)}, not {wanted}")


def _kind(value: Any) -> str:
    if isinstance(value, list):
        types = set(map(type, value))
        return "a list of strings" if types == {str} else "a list of objects" if types == {dict} else "a list"
    kinds = {"str": "a string", "int": "a number", "float": "a number", "dict": "an object", "NoneType": "a null"}
    name = type(value).__name__
    return kinds.get(name, f"a {name}")


# ---- messages -------------------------------------------------------------------------------------------------------


def from_messages(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of a record of messages, as the tokenizer's chat template writes them.

    A completion may repeat the end of the prompt's messages, or all of them: this part is left out.

    Raises:
        BadRecord: a value is missing or no list of messages of text; prompt or completion is empty; a completion begins
            with a question; or the template refuses the messages, leaves some out, or writes the prompt (with its
            generation prompt) differently inside the conversation.
    """
    chosen, rejected = (_messages(record[column], column) for column in ("chosen", "rejected"))
    if isinstance(record.get("prompt", ""), str):
        cut = _shared_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        if "prompt" not in record and not prompt and chosen and rejected and chosen != rejected:
            raise _no_prompt(record)
        # some data sets have the prompt as a string, next to full conversations
        if "prompt" in record and record["prompt"] not in [_text(message) for message in prompt]:
            raise BadRecord(
                "the prompt is a string, but not a message that both chosen and rejected begin with; make it a list of "
                "messages"
            )
    else:
        prompt = _messages(record["prompt"], "prompt")
        repeated = _repeated(prompt, chosen, rejected)
        chosen, rejected = chosen[repeated:], rejected[repeated:]
    if not prompt:
        raise BadRecord("the prompt has no message")
    for completion in (chosen, rejected):
        if not any(value for message in completion for key, value in message.items() if key != "role"):
            raise BadRecord(EMPTY)
        if completion[0]["role"] in _ASKING:
            raise BadRecord(
                f"chosen or rejected begins with a message of the role {completion[0]['role']!r}, which the prompt "
                "does not end with; there an answer is expected"
            )
    start = _written(prompt, record, tokenizer, add_generation_prompt=True)
    both = [_written(prompt + completion, record, tokenizer) for completion in (chosen, rejected)]
    if not all(text.startswith(start) for text in both):
        raise BadRecord(
            "the chat template writes the prompt differently inside the conversation, before an answer of the role "
            f"{chosen[0]['role']!r}: rename the role, or use another template"
        )
    return start, both[0][len(start) :], both[1][len(start) :]


def chat_prompt(messages: Any, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt of messages as the tokenizer's chat template writes it, up to where the answer begins.

    Raises:
        BadRecord: messages are no list of messages of text, or the template refuses them or leaves some out.
    """
    if not (prompt := _messages(messages, "prompt")):
        raise BadRecord("the prompt has no message")
    return _written(prompt, record, tokenizer, add_generation_prompt=True)


def _messages(value: Any, column: str) -> list[Message]:
    messages = [value] if isinstance(value, dict) and isinstance(value.get("role"), str) else value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _wrong(column, value, "a list of messages")
    for message in messages:
        if not isinstance(message.get("role"), str):
            keys = ", ".join(message) or "no key"
            raise BadRecord(f"a message of {column} has no role (it has {keys}); needed are role and content")
        if all(part is None for key, part in message.items() if key != "role"):
            raise BadRecord(f"a message of {column} has no content")
        if not isinstance(message.get("content"), str | list | None):
            raise BadRecord(f"a message of {column} has {_kind(message['content'])} as its content, not a string")
        _text(message)
    return messages


def _text(message: Message) -> str:
    """The content of a message; of a list of parts all texts, with nothing between them."""
    content = message.get("content")
    if not isinstance(content, list):
        return content or ""
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = f"of the type {part.get('type')!r}" if isinstance(part, dict) else f"that is {_kind(part)}"
            raise BadRecord(f"the content of a message has a part {kind}; this trainer is for text")
        texts.append(text)
    return "".join(texts)


def _repeated(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages are both at the prompt's end and at the beginning of chosen and rejected."""
    for length in range(len(prompt), 0, -1):
        if chosen[:length] == rejected[:length] == prompt[-length:]:
            return length
    return 0


# ---- chat templates -------------------------------------------------------------------------------------------------


def _written(
    messages: list[Message],
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    add_generation_prompt: bool = False,
) -> str:
    """By the chat template, in the form of contents that it expects: strings or lists of parts."""
    structure = tuple(
        _Slot(
            each["role"],
            in_parts=isinstance(each.get("content"), list),
            is_plain=all(key in ("role", "content", "name") for key, part in each.items() if part is not None),
        )
        for each in messages
    )
    expected = _expected(tokenizer, str(tokenizer.chat_template), structure, add_generation_prompt)
    if expected.left_out is not None:
        raise BadRecord(
            f"the chat template leaves out messages of the role {expected.left_out!r}: rename the role, or use another "
            "template"
        )
    messages = [_reformed(each, expected.form) if each.get("content") else each for each in messages]
    try:
        tools, options = (_parsed(record.get(column)) for column in ("tools", "chat_template_kwargs"))
        options = {**(options or {}), "tools": tools or None, "tokenize": False}
        return str(tokenizer.apply_chat_template(messages, **options, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise BadRecord(f"the chat template refuses the messages or tools ({error})") from error


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value else value


class _Slot(NamedTuple):
    """What the form of contents depends on: a message with more than role and content may be written without it."""

    role: str
    in_parts: bool
    is_plain: bool


class _Expected(NamedTuple):
    form: str
    left_out: str | None = None  # the role of messages that the template does not write, as with roles unknown to it


@functools.lru_cache(maxsize=1024)
def _expected(
    tokenizer: PreTrainedTokenizerBase, template: str, structure: tuple[_Slot, ...], add_generation_prompt: bool
) -> _Expected:
    """The form of contents in which the template writes a conversation of this structure: seen from one with marks."""
    marks = [f"{_MARK}{number:03}" for number in range(len(structure))]
    fault: _Expected | None = None
    for form in ("given", "strings", "parts"):
        messages: list[Message] = [
            {"role": slot.role, "content": [{"type": "text", "text": mark}] if slot.in_parts else mark}
            for slot, mark in zip(structure, marks, strict=True)
        ]
        messages = [_reformed(each, form, **{_UNREAD: ""}) for each in messages]
        try:
            text = str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except Exception:  # another form is expected, or true contents are: then the record itself will show it
            continue
        if _UNREAD in text:  # a template for strings writes a part as it is, down to a key that means nothing
            continue
        unseen = (slot.role for slot, mark in zip(structure, marks, strict=True) if slot.is_plain and mark not in text)
        left_out = next(unseen, None)
        if left_out is None:
            return _Expected(form)
        fault = fault or _Expected(form, left_out)
    return fault or _Expected("strings")


def _reformed(message: Message, form: str, **extra: str) -> Message:
    """With its content as it is given (of a part only the text), as a string, or as parts."""
    content = message["content"]
    if form == "strings" or (form == "given" and isinstance(content, str)):
        return {**message, "content": _text(message)}
    parts = [content] if isinstance(content, str) else content
    texts = [part if isinstance(part, str) else part["text"] for part in parts]
    return {**message, "content": [{"type": "text", "text": text} | extra for text in texts]}
