"""Preference records -> token ids -> packed batch.

    records ── forms, tokenize_pairs ──> prompt_ids, chosen_ids, rejected_ids ── PairCollator ──> one batch

Two boundaries decide whether the loss is right, and both are exact here: the prompt's ids are those of inference, and
the rows of the batch are the positions that predict a completion token, and no others.
"""

import contextlib
import inspect
import logging
import string
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import torch
from datasets import Audio, Dataset, Features, Image, List, Value, Video
from pyarrow import compute
from transformers import PreTrainedTokenizerBase

from hdpo_train.data import forms
from hdpo_train.data.forms import BadRecord
from hdpo_train.data.own_reference import COLUMNS, OF_TRL, own_reference
from hdpo_train.data.records import described, load_records
from hdpo_train.model.packing import PADDED, Layout, lay_out

__all__ = ["PairCollator", "load_records", "pair_lengths", "pair_tokens", "tokenize_pairs"]

logger = logging.getLogger(__name__)

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_FEATURES = Features(
    {**{column: List(Value("int32")) for column in _IDS}, "bad": Value("string"), "repeats": Value("bool")}
)
_TEXTS = ("prompt", "chosen", "rejected")
_OF_TEMPLATES = ("tools", "chat_template_kwargs")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_NUMBERS_SHOWN = 5

Pair = tuple[list[int], list[int], list[int]]  # ids of prompt, chosen, rejected


def tokenize_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    on_bad_record: Literal["stop", "drop"] = "stop",
    num_proc: int | None = None,
    name: str = "train",
) -> Dataset:
    """Turn preference records into token ids: columns prompt_ids, chosen_ids, rejected_ids, and, if the records have
    them, ref_chosen_logp and ref_rejected_logp (also under TRL's names, ref_chosen_logps and ref_rejected_logps).

    A record is one of: prompt, chosen, rejected (strings); chosen and rejected that begin with the same prompt; the
    same two forms as lists of messages, written out by the tokenizer's chat template (which gets the columns `tools`
    and `chat_template_kwargs` too); or those three columns of ids, which are only checked and cut.

    prompt_ids is what the model sees at inference: `tokenizer(prompt)`, or the chat template with its generation
    prompt. No token spans the end of the prompt: where prompt and completion would merge, the completion is tokenized
    apart. A completion that is a string gets an EOS unless it ends in one; a template brings its own. The content of a
    message may be a list of parts of text: a template that expects strings gets them joined, with nothing between.

    Arrow gives all structs of a column the same keys; those that are None are left out of messages, tools and
    chat_template_kwargs. Records of `load_records` from JSON, and features of the type Json, keep the nulls they have.

    Columns that have no effect are named in a warning; with one of images, video or audio the data set is refused.

    Args:
        dataset: the records.
        tokenizer: of the model to train.
        max_length: tokens of prompt + completion; what is beyond is cut from the end of the completion.
        max_prompt_length: tokens of the prompt; what is beyond is cut from its start, after a leading BOS.
        on_bad_record: "stop" raises if there is a bad record, "drop" leaves them out with a warning. Bad is a record
            with a value that is missing or of another type; an empty completion or prompt; chosen equal to rejected; a
            pair of which `max_length` leaves no completion or no difference; no prompt column and no common beginning;
            messages that have parts other than text, that the chat template refuses or leaves out, or whose prompt it
            writes differently inside the conversation.
        num_proc: processes to tokenize with.
        name: what to call the data set in messages.

    Raises:
        TypeError: `dataset` is not a `datasets.Dataset`.
        ValueError: the data set is empty, lacks columns or has images, video or audio; the tokenizer lacks the EOS or
            chat template that the records need; an argument is out of range; there are bad records ("stop"), counted by
            kind and numbered from 1; or no record is left ("drop").
        ChildProcessError: a process that tokenizes was killed.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"the {name} data set is a {type(dataset).__name__}, not a datasets.Dataset: pick one of the splits, "
            "and load it without streaming"
        )
    if on_bad_record not in ("stop", "drop"):
        raise ValueError(f"on_bad_record={on_bad_record!r}: must be 'stop' or 'drop'")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length}: must be at least 2, a token of prompt and one of completion")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length={max_prompt_length}: must be at least 1")
    where = described(dataset, name)
    form = _form(dataset, tokenizer, where)
    _check_columns(dataset, form, where)
    logps, bad_logps = own_reference(dataset, where)
    # a batch comes as an Arrow table: datasets' own decoding rounds the numbers in JSON
    map_options: dict[str, Any] = dict(
        batched=True,
        fn_kwargs={
            "form": form,
            "columns": dataset.features,
            "encoder": _Encoder(tokenizer, rendered=form == "messages"),
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
            # The cache knows a function by its name: without the code, it would return what an old version computed.
            "code": [inspect.getsource(module) for module in (forms, sys.modules[__name__])],
        },
        remove_columns=dataset.column_names,
        features=_FEATURES,
        num_proc=num_proc,
        desc=f"Tokenizing {name}",
    )
    with killed_workers_named("dataset_num_proc", num_proc):
        tokenized = dataset.with_format("arrow").map(_tokenize_batch, **map_options).with_format(None)
    kinds: list[str | None] = [kind or other for kind, other in zip(tokenized["bad"], bad_logps, strict=True)]
    good = [index for index, kind in enumerate(kinds) if kind is None]
    repeats: list[bool] = tokenized["repeats"][:]
    if good and all(repeats[index] for index in good):
        logger.warning(
            "In all records of the %s chosen and rejected begin with the prompt, which the model will then see twice. "
            "If that is not meant, leave the column prompt out: what both begin with will be the prompt.",
            where,
        )
    tokenized = tokenized.select_columns(list(_IDS))
    for column, values in logps.items():
        tokenized = tokenized.add_column(column, values)
    if len(good) == len(kinds):
        return tokenized
    summary = _summary(kinds, where)
    if not good:
        raise ValueError(f"{summary}\nNo record is left.")
    if on_bad_record == "stop":
        raise ValueError(f"{summary}\nMend these records, or leave them out with --on_bad_record drop.")
    logger.warning("%s\nThey are left out.", summary)
    return tokenized.select(good)


@contextlib.contextmanager
def killed_workers_named(option: str, processes: int | None) -> Iterator[None]:
    """Raise ChildProcessError, naming this option, if one of its processes was killed."""
    try:
        yield
    except RuntimeError as error:  # of datasets and torch; neither has a type of its own
        killed = ("subprocesses has abruptly died", "DataLoader worker (pid")
        if not processes or not any(text in str(error) for text in killed):
            raise
        raise ChildProcessError(
            f"one of the processes of {option}={processes} was killed; usually the machine had no memory left for it: "
            f"give a smaller {option}"
        ) from error


def _form(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, where: str) -> Literal["ids", "messages", "strings"]:
    """The form of the records; raises if the columns or the tokenizer allow for none."""
    columns = dataset.column_names
    if not len(dataset):
        raise ValueError(f"the {where} has no records")
    if set(_IDS) <= set(columns):
        return "ids"
    if missing := [column for column in ("chosen", "rejected") if column not in columns]:
        raise ValueError(
            f"the {where} has no column {' and no column '.join(missing)}; it has {', '.join(columns)}. Needed "
            "are prompt, chosen and rejected; or chosen and rejected that begin with the prompt; or " + ", ".join(_IDS)
        )
    first = next((chosen for chosen in dataset["chosen"] if chosen is not None), None)
    if isinstance(first, dict) or (isinstance(first, list) and any(isinstance(part, dict) for part in first)):
        if not tokenizer.chat_template:
            raise ValueError(
                f"the {where} has messages, but the tokenizer has no chat template: set "
                "tokenizer.chat_template, use the tokenizer of a chat model, or give prompt and completions as strings"
            )
        return "messages"
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token, so that no completion would end: set tokenizer.eos_token to a token of "
            "its vocabulary"
        )
    return "strings"


def _check_columns(dataset: Dataset, form: str, where: str) -> None:
    """Refuse images, video and audio, and name the columns that have no effect."""
    used = {"ids": _IDS, "strings": _TEXTS, "messages": _TEXTS + _OF_TEMPLATES}[form]
    unused = [column for column in dataset.column_names if column not in (*used, *COLUMNS, *OF_TRL)]
    for column in unused:
        feature = dataset.features[column]
        if (column in _MEDIA or isinstance(getattr(feature, "feature", feature), Audio | Image | Video)) and any(
            any(forms.as_written(value, feature) for value in table[column].to_pylist())
            for table in dataset.select_columns(column).with_format("arrow").iter(batch_size=1000)
        ):
            raise ValueError(
                f"the {where} has {column} in a column: this trainer is for text, and the model would not see them. "
                f"Without it, as in dataset.remove_columns({column!r}), the text alone is trained on"
            )
    if unused:
        logger.warning("Columns of the %s that have no effect: %s", where, ", ".join(unused))


def _summary(kinds: list[str | None], where: str) -> str:
    numbers = defaultdict(list)
    for number, kind in enumerate(kinds, 1):
        if kind is not None:
            numbers[kind].append(number)
    lines = [f"{sum(map(len, numbers.values()))} of the {len(kinds)} records of the {where} cannot be used:"]
    for kind, found in sorted(numbers.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(map(str, found[:_NUMBERS_SHOWN])) + (", ..." if len(found) > _NUMBERS_SHOWN else "")
        lines.append(f"  {len(found)} x {kind}: record{'s' if len(found) > 1 else ''} {shown}")
    return "\n".join(lines)


def _tokenize_batch(
    batch: pa.Table,
    form: str,
    columns: Features,
    encoder: "_Encoder",
    max_length: int | None,
    max_prompt_length: int | None,
    code: list[str],
) -> dict[str, list]:
    """One batch for `Dataset.map`: the ids; in `bad` the kind of a bad record, whose ids are empty; and in `repeats`
    whether a good record has strings that both begin with the prompt.
    """
    needed = [column for column in batch.column_names if column in (*_IDS, *_TEXTS, *_OF_TEMPLATES)]
    rows = [
        dict.fromkeys(columns) | {key: forms.as_written(value, columns[key]) for key, value in row.items()}
        for row in batch.select(needed).to_pylist()
    ]
    repeats = [False] * len(rows)
    if form == "ids":
        pairs = [_unless_bad(_given_ids, row) for row in rows]
    elif form == "messages":
        pairs = encoder.pairs([_unless_bad(forms.from_messages, row, encoder.tokenizer) for row in rows])
    else:
        texts = [_unless_bad(forms.from_strings, row) for row in rows]
        if "prompt" in columns:
            repeats = [not isinstance(text, BadRecord) and _repeats_prompt(*text) for text in texts]
        pairs = encoder.pairs(texts)
    pairs = [_unless_bad(_fit, pair, encoder.tokenizer, max_length, max_prompt_length) for pair in pairs]
    bad = [str(pair) if isinstance(pair, BadRecord) else None for pair in pairs]
    ids = zip(*(([], [], []) if isinstance(pair, BadRecord) else pair for pair in pairs), strict=True)
    return {**{name: list(column) for name, column in zip(_IDS, ids, strict=True)}, "bad": bad, "repeats": repeats}


def _repeats_prompt(prompt: str, chosen: str, rejected: str) -> bool:
    return bool(prompt) and chosen.startswith(prompt) and rejected.startswith(prompt)


def _unless_bad(function: Callable, value: Any, *args: Any) -> Any:
    """function(value, *args), or the BadRecord that value is or becomes: bad records keep their place in a batch."""
    try:
        return value if isinstance(value, BadRecord) else function(value, *args)
    except BadRecord as bad:
        return bad


def _given_ids(record: dict[str, Any]) -> Pair:
    prompt, chosen, rejected = (record[column] for column in _IDS)
    for ids in (prompt, chosen, rejected):
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int} or min(ids, default=0) < 0:
            raise BadRecord(f"one of {', '.join(_IDS)} is missing or not a list of token ids")
    return prompt, chosen, rejected


class _Encoder:
    """A tokenizer that keeps prompt and completion apart.

    `rendered` texts were written by a chat template, which brings every special token; others get theirs here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendered: bool):
        self.tokenizer, self.rendered = tokenizer, rendered
        eos = [tokenizer.eos_token_id]
        self.adds_eos = not rendered and self._ids("a", True)[-1:] == eos and self._ids("a", False)[-1:] != eos
        # Sentencepiece-like tokenizers put a space before a text. There a completion is tokenized behind an anchor, a
        # character whose tokens are taken off again; other tokenizers need none.
        visible = {c: self._ids(c, False) for c in string.ascii_letters + string.digits + string.punctuation}
        anchors = {c: ids for c, ids in visible.items() if str(tokenizer.decode(ids)).strip() == c}
        adds_space = any("".join(tokenizer.convert_ids_to_tokens(ids)) != c for c, ids in anchors.items())
        self.anchors = anchors if adds_space else {"": []}

    def _ids(self, text: str | list[str], special: bool) -> list:
        # not verbose: a text longer than the model takes will be cut
        return self.tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]

    def pairs(self, texts: list[tuple[str, str, str] | BadRecord]) -> list[Pair | BadRecord]:
        """Ids of prompt, chosen and rejected of each triple of texts."""
        good = [text for text in texts if not isinstance(text, BadRecord)]
        parts = [part for prompt, *both in good for part in (prompt, prompt + both[0], prompt + both[1])]
        ids = iter(self._ids(parts, not self.rendered) if parts else [])
        joint = iter(zip(ids, ids, ids, strict=True))
        return [text if isinstance(text, BadRecord) else _unless_bad(self._split, text, next(joint)) for text in texts]

    def _split(self, texts: tuple[str, str, str], joint: Pair) -> Pair:
        """From the ids of prompt, prompt + chosen and prompt + rejected, each tokenized as one."""
        prompt, *both = [ids[:-1] for ids in joint] if self.adds_eos else joint
        eos = [] if self.rendered else [self.tokenizer.eos_token_id]
        for i, (text, ids) in enumerate(zip(texts[1:], both, strict=True)):
            # the ids of the joint text are the natural ones, where they keep to the boundary
            ids = ids[len(prompt) :] if ids[: len(prompt)] == prompt else self._continuation(text)
            both[i] = ids if ids[-1:] == eos else ids + eos
        return prompt, both[0], both[1]

    def _continuation(self, text: str) -> list[int]:
        """Ids of a text that follows another."""
        for anchor, start in self.anchors.items():
            ids = self._ids(anchor + text, False)
            if ids[: len(start)] == start:
                return ids[len(start) :]
        raise BadRecord("the tokenizer has no token boundary where the completion begins")


def _fit(pair: Pair, tokenizer: PreTrainedTokenizerBase, max_length: int | None, max_prompt_length: int | None) -> Pair:
    """Check the ids of a pair and cut them to length."""
    prompt, chosen, rejected = pair
    if not all(any(token != tokenizer.eos_token_id for token in ids) for ids in (chosen, rejected)):
        raise BadRecord(forms.EMPTY)
    if chosen == rejected:
        raise BadRecord("chosen and rejected are the same")
    if not prompt:
        raise BadRecord("the prompt has no token (an empty prompt needs a tokenizer that begins with a BOS)")
    if max_prompt_length is not None and len(prompt) > max_prompt_length:
        bos = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
        prompt = bos + prompt[len(prompt) - max_prompt_length + len(bos) :]
    if max_length is not None:
        room = max(max_length - len(prompt), 0)
        chosen, rejected = chosen[:room], rejected[:room]
        if chosen == rejected:  # be it that nothing is left of them
            hint = "give a larger --max_length or a --max_prompt_length"
            raise BadRecord(f"max_length={max_length} leaves no completion, or no difference between the two ({hint})")
    return prompt, chosen, rejected


def pair_lengths(dataset: Dataset) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected of each tokenized pair."""
    tables = dataset.select_columns(list(_IDS)).with_format("arrow").iter(batch_size=1000)
    columns = ([compute.list_value_length(table[name]).to_pylist() for name in _IDS] for table in tables)
    return [lengths for table in columns for lengths in zip(*table, strict=True)]


def pair_tokens(dataset: Dataset, layout: Layout) -> list[int]:
    """Tokens that each tokenized pair puts into a batch."""
    return [layout.tokens(*lengths) for lengths in pair_lengths(dataset)]


class Examples:
    """The records of a batch. It is no list, because frameworks would look for tensors in one."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows


@dataclass
class PairCollator:
    """Lay out P tokenized pairs, S = 2P sequences, as a batch of B rows of R tokens.

    Chosen and rejected are interleaved: sequence 2p is the chosen one of pair p, 2p + 1 its rejected one. Only the N
    positions that predict a completion token are scored: neither padding nor prompt reaches the LM head.

    Args:
        pad_token_id: the token to pad with; it is masked, so that any token of the vocabulary will do.
        layout: see `packing`; by default a row for each sequence, padded on the right to the longest.

    A call takes a list of examples {prompt_ids, chosen_ids, rejected_ids} and returns
        input_ids (B, R) int64
        counts (B, R) int64: of how many sequences each token is part: 2 in a shared prompt, 0 in padding
        position_ids (1, R) int64 and documents, tuples of lengths: in a packed batch, see `packing.Places`. A padded
            one needs no mask: no token sees the padding, which is on its right
        rows (N,) int64: indices into the B·R flattened positions; the hidden state there predicts the label. With a
            shared prompt its last position predicts the first token of both sequences, and is in rows twice.
        labels: the completion tokens, (N,) int64 in an `OnHost`: on the host the loss checks them
        cu_seqlens, S + 1 ints: sequence s has rows and labels cu_seqlens[s] to cu_seqlens[s + 1]; a list, so that no
            framework moves it to the device
        num_tokens: tokens of prompt and completion of all sequences, whatever the layout saves or adds
        examples: the list itself, from which a part of the batch can be laid out again
        ref_logps (S,) float32, nats: if the examples have ref_chosen_logp and ref_rejected_logp

    Raises:
        ValueError: an example has an empty prompt, so that nothing predicts its first completion token.
    """

    pad_token_id: int
    layout: Layout = PADDED

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        pairs = [(e["prompt_ids"], e["chosen_ids"], e["rejected_ids"]) for e in examples]
        for number, (prompt, _, _) in enumerate(pairs):
            if not len(prompt):
                raise ValueError(f"prompt_ids of pair {number} in the batch is empty: nothing predicts its completions")
        batch = lay_out(pairs, self.layout, self.pad_token_id)
        batch["examples"] = Examples(examples)
        if "ref_chosen_logp" in examples[0]:
            logps = [e[key] for e in examples for key in ("ref_chosen_logp", "ref_rejected_logp")]
            batch["ref_logps"] = torch.tensor(logps, dtype=torch.float32, device="cpu")
        return batch
