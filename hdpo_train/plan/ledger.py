"""Which bytes are alive while a program runs, by kind, and how many there are at most."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HOST = "host"  # a kind that is not on the device


@dataclass
class Segment:
    """A part of a program: bytes by kind at its start, when most of the device's are alive, and at its end."""

    start: Counter[str]
    peak: Counter[str]
    end: Counter[str] = field(default_factory=Counter)


class Ledger(TorchDispatchMode):
    """Books every tensor that an operator makes while the mode is on, and crosses it out when its memory is freed.

    Only sizes are read, so that the tensors may be fake.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.segments: dict[Any, Segment] = {}
        self.kind = "other"  # of tensors made from now on
        self._next: Any = None
        self._open: Segment | None = None
        self._most = 0  # bytes on the device at the open segment's peak
        self._alive: dict[int, tuple[Any, str, int]] = {}  # a storage's id -> weak reference, kind, bytes

    def mark(self, name: Any) -> None:
        """Begin another segment with the next operation; what is freed until then belongs to the one before."""
        self._next = name

    def close(self) -> None:
        """End the last segment."""
        if self._open is not None:
            self._open.end = self.now.copy()
        self._open = self._next = None

    def _begin(self) -> None:
        name = self._next
        self.close()
        self._open = self.segments[name] = Segment(self.now.copy(), self.now.copy())
        self._most = on_device(self.now)

    def own(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Book these tensors' memory as of a kind."""
        for tensor in tensors:
            if tensor is not None:
                self._book(tensor, kind)

    @contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def add(self, kind: str, nbytes: int) -> None:
        if self._next is not None:
            self._begin()
        self.now[kind] += nbytes
        if self._open is not None and (total := on_device(self.now)) > self._most:
            self._most, self._open.peak = total, self.now.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._next is not None:
            self._begin()
        result = func(*args, **(kwargs or {}))
        self._book_all(result)
        return result

    def _book_all(self, result: Any) -> None:
        if isinstance(result, Tensor):
            self._book(result)
        elif isinstance(result, (tuple, list)):
            for each in result:
                self._book_all(each)

    def _book(self, tensor: Tensor, kind: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._alive.get(key)
        if known is None:
            reference = weakref.ref(storage, lambda _: self._cross_out(key))
            self._alive[key] = (reference, kind or self.kind, nbytes := storage.nbytes())
            self.add(kind or self.kind, nbytes)
        elif kind is not None and known[1] != kind:
            reference, old, nbytes = known
            self._alive[key] = (reference, kind, nbytes)
            self.now[old] -= nbytes
            self.now[kind] += nbytes

    def _cross_out(self, key: int) -> None:
        _, kind, nbytes = self._alive.pop(key)
        self.now[kind] -= nbytes


def on_device(sizes: Counter[str]) -> int:
    return sum(sizes.values()) - sizes[HOST]
