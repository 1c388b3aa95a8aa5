"""Where preference records come from.

    file, folder or hub id ── load_records ──> records, whose three texts `forms` finds

JSON is read here rather than by `datasets`: there, records of different keys would share one Arrow struct, which gives
every record all keys, as null. Here a value is what its file says: lists and objects stay JSON text until their use.
"""

import contextlib
import glob
import gzip
import hashlib
import inspect
import json
import logging
import os
import sys
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import pyarrow as pa
from datasets import (
    Dataset,
    Features,
    Json,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.table import MemoryMappedTable

logger = logging.getLogger(__name__)

_FORMATS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".json.gz": "json", ".parquet": "parquet"}
_ENDINGS = ", ".join(_FORMATS)
_SOURCE = "records of "
_SCALARS = {str: "string", bool: "bool", int: "int64", float: "float64"}
_MAX_DEPTH = 200  # of lists and objects; well below where Python's recursion ends, and above any data
_TOO_DEEP = f"lists and objects are nested too deeply, more than {_MAX_DEPTH} levels"
_BOM = b"\xef\xbb\xbf"


def load_records(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """Load preference records from this machine or from the hub; code that comes with a data set is never run.

    A file is read again when its contents have changed, whatever its modification time says.

    Args:
        name: a .jsonl, .json (also .gz) or .parquet file; a folder of such files, or one made by `save_to_disk`; or
            else a data set id on the hub.
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


def training_split(dataset: Any) -> Any:
    """The split "train" of a DatasetDict or other dict, with a warning; anything else as it is.

    Raises:
        ValueError: the dict has no such split.
    """
    if not isinstance(dataset, dict):
        return dataset
    kind, splits = type(dataset).__name__, ", ".join(map(str, dataset))
    if "train" not in dataset:
        raise ValueError(
            f"train_dataset is a {kind} with the splits {splits}: give one of them, "
            f"train_dataset=dataset[{next(iter(dataset), 'train')!r}]"
        )
    logger.warning('train_dataset is a %s with the splits %s: "train" is trained on', kind, splits)
    return dataset["train"]


# ---- files and folders ----------------------------------------------------------------------------------------------


def _find(name: str, split: str, config: str | None) -> Dataset:
    path = Path(name).expanduser()
    if path.is_file():
        if _builder(path) is None:
            raise ValueError(f"{path}: a file of records ends in one of {_ENDINGS}")
        if config is not None:
            raise ValueError(f"{path}: a file has no configurations, leave out config={config!r}")
        return _pick(path, {"train": _read([path])}, split)
    if path.is_dir():
        return _pick(path, _splits_of_folder(path, config), split)
    if _builder(path) or name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{path}: no such file or folder (looked for {path.absolute()})")
    try:
        return load_dataset(name, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        message = f"{name!r} is no file or folder here, and could not be had from the hub: {error}"
        raise FileNotFoundError(message) from error


def _builder(path: Path) -> str | None:
    return next((builder for ending, builder in _FORMATS.items() if path.name.lower().endswith(ending)), None)


def _splits_of_folder(path: Path, config: str | None) -> dict[str, Dataset]:
    names = (datasets.config.DATASETDICT_JSON_FILENAME, datasets.config.DATASET_STATE_JSON_FILENAME)
    if any((path / name).is_file() for name in names):  # made by save_to_disk
        try:
            saved = load_from_disk(str(path))
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise ValueError(f"{path} cannot be loaded: {error}") from error
        return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    found = sorted(file for file in path.rglob("*") if _builder(file))
    if not found:
        raise FileNotFoundError(f"{path}: no file in this folder ends in one of {_ENDINGS}")
    try:
        data_files = load_dataset_builder(str(path), config).config.data_files
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    splits = {str(split): [Path(file) for file in files] for split, files in data_files.items()}
    read = {file for files in splits.values() for file in files}
    if unread := [str(file.relative_to(path)) for file in found if file.resolve() not in read]:
        logger.warning("%s: not read are %s", path, ", ".join(unread[:5]) + (", ..." if len(unread) > 5 else ""))
    return {split: _read(files) for split, files in splits.items()}


def _pick(path: Path, splits: dict[str, Dataset], split: str) -> Dataset:
    """The split, or slices of splits, that an instruction such as "train[:100]" names."""
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(data) for name, data in splits.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{path} has no split {split!r} ({error}); it has {', '.join(splits)}") from error
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _read(files: list[Path]) -> Dataset:
    """The records of files of one type, from the cache if files of these contents have been read before."""
    digest = _digest(files)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "hdpo_records" / digest
    if _builder(files[0]) == "json":
        arrow = cache / "records.arrow"
        if not arrow.exists():
            _write(files, arrow)
        return Dataset(MemoryMappedTable.from_file(str(arrow)), fingerprint=digest)
    names = [glob.escape(str(file.resolve())) for file in files]  # data_files takes patterns: a [ would be one
    try:
        return load_dataset("parquet", data_files={"train": names}, split="train", cache_dir=str(cache))
    except Exception as error:  # the readers raise many types, most without the name of the file
        bad = ", ".join(map(str, files[:5]))
        raise ValueError(f"{bad} cannot be loaded: {error.__cause__ or error}") from error


def _digest(files: list[Path]) -> str:
    """Digest of files' contents, not of names and times: a file may be rewritten within a tick of its clock."""
    digest = hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode())
    for path in files:
        each = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                each.update(block)
        digest.update(each.digest())
    return digest.hexdigest()[:32]


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _write(files: list[Path], arrow: Path) -> None:
    """Copy records to an Arrow file: plain values by their type, all others as JSON text."""
    features = _features(files)
    arrow.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arrow.parent) as folder:  # other processes may write the same
        part = Path(folder) / arrow.name
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
            for path in files:
                records = _records(path)
                while batch := list(islice(records, 1000)):
                    writer.write_table(_table(batch, features))
        os.replace(part, arrow)


def _features(files: list[Path]) -> Features:
    types: dict[str, set[type]] = defaultdict(set)
    number = 0
    for path in files:
        for record in _records(path):
            number += 1
            for column, value in record.items():
                is_long = type(value) is int and not -(2**63) <= value < 2**63
                types[column] |= {object if is_long else type(value)} - {type(None)}
    if not number:
        raise ValueError(f"{', '.join(map(str, files))} is empty: there is no record in it")
    return Features(
        {
            column: Value(_SCALARS[next(iter(found))]) if len(found) == 1 and found <= set(_SCALARS) else Json()
            for column, found in types.items()
        }
    )


def _table(records: list[dict[str, Any]], features: Features) -> pa.Table:
    schema = features.arrow_schema
    columns = []
    for column, feature in features.items():
        values: Iterable[Any] = (record.get(column) for record in records)
        if isinstance(feature, Json):
            values = (None if value is None else json.dumps(value) for value in values)
        columns.append(pa.array(list(values), type=schema.field(column).type))
    return pa.table(columns, schema=schema)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines, or of one JSON array. Raises ValueError, naming file and line."""
    try:
        with path.open("rb") as packed:
            is_gzip = packed.read(2) == b"\x1f\x8b"
            packed.seek(0)
            with contextlib.closing(gzip.open(packed) if is_gzip else packed) as file:
                yield from _records_of(cast(BinaryIO, file), path)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _records_of(file: BinaryIO, path: Path) -> Iterator[dict[str, Any]]:
    is_first = True
    for number, line in enumerate(file, 1):
        line = line.removeprefix(_BOM) if number == 1 else line
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith(b"["):
            for at, record in enumerate(_parsed(line + file.read(), path, number), 1):
                yield _checked(record, f"{path}, record {at}")
            return
        is_first = False
        yield _checked(_parsed(line.rstrip(), path, number), f"{path}, line {number}")


def _checked(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record is an object {{...}}, this is {json.dumps(record)[:60]}")
    depth = 0
    level: list[Any] = [record]
    while level:
        depth += 1
        level = [part for each in level for part in _parts(each) if isinstance(part, dict | list)]
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where}: {_TOO_DEEP}")
    return record


def _parts(value: dict | list) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _parsed(text: bytes, path: Path, line: int) -> Any:
    """The value of a JSON text that begins in this line of the file."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
        if b"\\ud" in text.lower():  # half of a surrogate pair is no character
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        line += text.count(b"\n", 0, error.start)
        fault = f"the byte {text[error.start]:#04x} is not UTF-8; save the file as UTF-8"
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        near = error.doc[max(error.pos - 20, 0) : error.pos + 20].strip()
        fault = f"malformed JSON ({error.msg}) near {near!r}"
    except RecursionError:
        fault = _TOO_DEEP
    except ValueError as error:
        fault = f"malformed JSON ({error})"
    else:
        return value
    raise ValueError(f"{path}, line {line}: {fault}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return value
