"""Samples of a model, and the JSONL file that they are appended to, batch by batch, while they are drawn.

{"format": "hdpo samples 1", "name": …, …}             everything that the samples depend on
{"prompt": 0, "temperature": 1.0, "index": 0, "completion": " 12", "num_tokens": 3, "entropy": 1.7, "ended": true}
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = "hdpo samples 1"


class Request(NamedTuple):
    prompt: int  # number of the prompt, from 0
    temperature: float  # 0: greedy
    index: int  # number of the sample of that prompt


class Sample(NamedTuple):
    prompt: int
    temperature: float
    index: int
    completion: str
    num_tokens: int | None = None  # generated, the end included; None: unknown, of another engine
    entropy: float | None = None  # nats, summed over these tokens
    ended: bool | None = None  # by EOS; or cut at max_new_tokens


class SamplesFile:
    """The samples of fixed batches. What a killed run wrote of a batch, or of a line, is dropped and drawn again.

    Raises ValueError if the file is of other settings (names the first that differs), or no such file.
    """

    def __init__(self, path: Path, header: dict[str, Any], batches: Sequence[Sequence[Request]]) -> None:
        self.path = path
        self._header = _line({"format": FORMAT, **header})
        self.samples, self.num_batches, self._size = self._read(batches)

    def _read(self, batches: Sequence[Sequence[Request]]) -> tuple[list[Sample], int, int]:
        """Samples of whole batches, the number of these, and the bytes that hold them."""
        content = self.path.read_bytes() if self.path.exists() else b""
        if self._header.startswith(content):  # nothing, or killed while writing the header
            return [], 0, 0
        first, _, rest = content.partition(b"\n")
        _compare(self.path, first, self._header)
        lines = rest.split(b"\n")[:-1]  # what no line break ends was torn
        samples: list[Sample] = []
        for number, batch in enumerate(batches):
            part = lines[len(samples) : len(samples) + len(batch)]
            if len(part) < len(batch):
                break
            for request, line in zip(batch, part, strict=True):
                samples.append(self._parse(line, request, len(samples) + 2))
        else:
            number = len(batches)
            if len(lines) > len(samples):
                raise ValueError(f"{self.path} holds {len(lines)} samples, {len(samples)} were to be drawn: delete it")
        size = len(first) + 1 + sum(len(line) + 1 for line in lines[: len(samples)])
        return samples, number, size

    def _parse(self, line: bytes, request: Request, number: int) -> Sample:
        try:
            sample = Sample(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}, line {number} is no sample ({error}): delete the file") from None
        if sample[:3] != request:
            raise ValueError(
                f"{self.path}, line {number} is of {sample[:3]}, expected {tuple(request)}: delete the file"
            )
        return sample

    def append(self, samples: Sequence[Sample]) -> None:
        """Write a batch, after what is whole."""
        text = b"".join(_line(sample._asdict()) for sample in samples)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._size)
            file.seek(self._size)
            self._size += file.write(text if self._size else self._header + text)
        self.samples += samples
        self.num_batches += 1


def digest(value: Any) -> str:
    """Short SHA-256 of anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"


def _compare(path: Path, first: bytes, header: bytes) -> None:
    try:
        found = json.loads(first)
        is_ours = found.get("format") == FORMAT
    except (ValueError, AttributeError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{path} is not a file of samples of this program: choose another output folder")
    for key, value in json.loads(header).items():
        if key != "name" and found.get(key) != value:
            raise ValueError(
                f"{path} holds samples with {key} = {found.get(key)}, this call has {key} = {value}: choose another "
                "output folder, or delete the file"
            )
