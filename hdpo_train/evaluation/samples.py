"""Samples of a model, and the JSONL file that they are appended to, batch by batch, while they are drawn.

{"format": "hdpo samples 1", "name": …, …}             everything that the samples depend on
{"prompt": 0, "temperature": 1.0, "number": 0, "completion": " 12", "num_tokens": 3, "entropy": 1.7, "ended": true}
"""

import gzip
import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hdpo_train.evaluation.problems import Problem

FORMAT = "hdpo samples 1"


class Request(NamedTuple):
    prompt: int  # which, from 0
    temperature: float  # 0: greedy
    number: int  # of the sample among that prompt's, from 0


class Sample(NamedTuple):
    prompt: int
    temperature: float
    number: int
    completion: str
    num_tokens: int | None = None  # generated, the end or stop string included; None: unknown, of another engine
    entropy: float | None = None  # nats, summed over these tokens
    ended: bool | None = None  # by EOS or a stop string; or cut at max_new_tokens


class SamplesFile:
    """The samples of fixed batches. What a killed run wrote of a batch, or of a line, is dropped and drawn again.

    samples, num_batches: what was there at the start.
    Raises ValueError if the file is of other settings (names the first that differs), or no such file.
    """

    def __init__(self, path: Path, header: dict[str, Any], batches: Sequence[Sequence[Request]]) -> None:
        self.path = path
        self._header = _line({"format": FORMAT, **header})
        self.samples, self.num_batches, self._size = self._read(batches)

    def _read(self, batches: Sequence[Sequence[Request]]) -> tuple[list[Sample], int, int]:
        """Samples of whole batches, the number of these, and the bytes that hold them."""
        content = self.path.read_bytes() if self.path.exists() else b""
        if len(content) < len(self._header) and self._header.startswith(content):  # killed while writing the header
            return [], 0, 0
        first, _, rest = content.partition(b"\n")
        _compare(self.path, first, self._header)
        lines = rest.split(b"\n")[:-1]  # what no line break ends was torn
        samples: list[Sample] = []
        num_batches = 0
        for batch in batches:
            part = lines[len(samples) : len(samples) + len(batch)]
            if len(part) < len(batch):
                break
            samples += [self._parse(*both) for both in zip(part, batch, strict=True)]
            num_batches += 1
        if num_batches == len(batches) and len(lines) > len(samples):
            raise ValueError(f"{self.path} holds {len(lines)} samples, {len(samples)} were asked for; delete the file")
        size = len(first) + 1 + sum(len(line) + 1 for line in lines[: len(samples)])
        return samples, num_batches, size

    def _parse(self, line: bytes, request: Request) -> Sample:
        try:
            sample = Sample(**json.loads(line))
            _generated(sample._asdict())
            if not isinstance(sample.completion, str):
                raise ValueError(f"completion must be a string, got {sample.completion!r}")
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.path}: where {request} should be is no sample ({error}); delete the file"
            ) from None
        if sample[:3] != request:
            raise ValueError(f"{self.path}: where {request} should be is {Request(*sample[:3])}; delete the file")
        return sample

    def append(self, samples: Sequence[Sample]) -> None:
        """Write a batch, after what is whole."""
        text = b"".join(_line(sample._asdict()) for sample in samples)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._size)
            file.seek(self._size)
            self._size += file.write(text if self._size else self._header + text)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the stop string that is complete first in it, or all of it.

    First complete, not first begun: a model that is stopped while it writes has not seen what would come later.
    """
    found = [(start + len(each), start) for each in stop if (start := text.find(each)) >= 0]
    return text[: min(found)[1]] if found else text


def read_samples(path: Path, problems: Sequence[Problem], stop: Sequence[str] = ()) -> list[Sample]:
    """Ready-made samples of any engine, or those of a `SamplesFile`: JSONL, also .gz.

    A line has "prompt", the text or messages of a problem or its number from 0; "completion", a text, or "completions",
    several; and may have "temperature", otherwise 1. Only a `SamplesFile` gives entropies.

    stop: each completion ends before the first of these strings. One that they shorten has ended, and has no known
    number of tokens and no entropy any more.

    Raises ValueError, with the line, for what is not of this form, or of a prompt that is not among the problems.
    """
    places: dict[str, list[int]] = {}
    for place, problem in enumerate(problems):
        places.setdefault(digest(problem.prompt), []).append(place)
    drawn: Counter[tuple[int, float]] = Counter()
    samples: list[Sample] = []
    is_ours = False
    for number, line in _lines(path):
        try:
            record = json.loads(line)
            if number == 1 and isinstance(record, dict) and record.get("format") == FORMAT:
                is_ours = True
                if record.get("prompts") != digest([problem.prompt for problem in problems]):
                    raise ValueError("these are samples of other prompts")
                continue
            prompt, temperature, completions = _ready_made(record, places, len(problems))
            more = _generated(record) if is_ours else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        for completion in completions:
            sample = Sample(prompt, temperature, drawn[prompt, temperature], completion, **more)
            if (kept := before_stop(completion, stop)) != completion:
                sample = sample._replace(completion=kept, num_tokens=None, entropy=None, ended=True)
            samples.append(sample)
            drawn[prompt, temperature] += 1
    if not samples:
        raise ValueError(f"{path} holds no sample")
    return samples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1. Raises OSError, or ValueError for a damaged .gz file."""
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def digest(value: Any) -> str:
    """Short SHA-256 of anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _generated(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a line of a `SamplesFile`, other than the text of its completion."""
    kinds = {"num_tokens": int | None, "entropy": int | float | None, "ended": bool | None}
    for key, kind in kinds.items():
        value = record.get(key)
        is_other = isinstance(value, bool) != (key == "ended") and value is not None  # True is an int to Python
        if is_other or not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{key} must be {str(kind).replace(' |', ' or')}, got {value!r}")
    return {key: record.get(key) for key in kinds}


def _ready_made(record: dict[str, Any], places: dict[str, list[int]], num: int) -> tuple[int, float, list[str]]:
    """Prompt, temperature and completions that a line of ready-made samples holds."""
    if not isinstance(record, dict) or "prompt" not in record or ("completion" in record) == ("completions" in record):
        raise ValueError('a line needs "prompt", and either "completion" or "completions"')
    prompt, temperature = record["prompt"], record.get("temperature", 1.0)
    completions = record["completions"] if "completions" in record else [record["completion"]]
    if not isinstance(completions, list) or not all(isinstance(each, str) for each in completions):
        raise ValueError("a completion must be a string, completions a list of strings")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number from 0 on, got {temperature!r}")
    is_number = isinstance(prompt, int) and not isinstance(prompt, bool) and 0 <= prompt < num
    found = [prompt] if is_number else places.get(digest(prompt), [])
    if len(found) != 1:
        is_there = f"is there {len(found)} times: name it by its number, from 0" if found else "is not in the file"
        raise ValueError(f"the prompt {str(prompt)[:60]!r} {is_there} of {num} prompts")
    return found[0], float(temperature), completions


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"


def _compare(path: Path, first: bytes, header: bytes) -> None:
    try:
        found = json.loads(first)
        is_ours = found.get("format") == FORMAT
    except (ValueError, AttributeError, RecursionError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{path} is not a file of samples of this program: choose another output folder")
    asked = json.loads(header)
    for key in {**asked, **found}:
        if key != "name" and found.get(key) != asked.get(key):
            raise ValueError(
                f"{path} holds samples with {key} = {found.get(key)}, this call has {key} = {asked.get(key)}: choose "
                "another output folder, or delete the file"
            )
