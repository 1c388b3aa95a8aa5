"""Work dealt to the processes of torchrun or accelerate launch by commands that train no model together.

eval, pairs ── group ──> dealt: batches of samples in turns; all processes get them, the main one keeps them
sweep       ── alone ──> every process for itself, on a GPU of its own, takes runs that no other has
"""

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed import rendezvous
from transformers.utils import logging

from hdpo_train.ranks import together
from hdpo_train.run.lock import locked

S = TypeVar("S")
T = TypeVar("T")


@contextlib.contextmanager
def group() -> Iterator[PartialState]:
    """The processes that a launcher has started, each with a GPU of its own, or this one alone.

    They are connected by gloo, also on GPUs: they exchange texts only, and notice at once when one of them has died.
    Raises ValueError if the launcher was told to shard models.
    """
    _check_launch()
    launched = "LOCAL_RANK" in os.environ
    state = PartialState(cpu=not torch.cuda.is_available(), **{"backend": "gloo"} if launched else {})
    if not state.is_main_process:
        logging.set_verbosity_error()  # warnings are said once
    try:
        yield state
    finally:
        if launched:  # a thread of gloo that meets the end of Python takes the process down (SIGABRT)
            state.destroy_process_group()
            PartialState._reset_state()


@contextlib.contextmanager
def locked_by_main(processes: PartialState, folder: Path, file: str = "") -> Iterator[None]:
    """`lock.locked` for all of them together."""
    with contextlib.ExitStack() as held:
        together(lambda: held.enter_context(locked(folder, file)) if processes.is_main_process else None)
        yield


def dealt(items: Sequence[S], action: Callable[[S], T], processes: PartialState | None) -> Iterator[T]:
    """action(item) of every item, in order. One process does each, and all get all results; if one fails, all raise."""
    if processes is None:
        yield from map(action, items)
        return
    for first in range(0, len(items), processes.num_processes):
        turn = items[first : first + processes.num_processes]
        mine = turn[processes.process_index : processes.process_index + 1]
        yield from gather_object(together(lambda mine=mine: [action(item) for item in mine]))  # type: ignore[misc]


class Alone(NamedTuple):
    """A process that works for itself, one of several that were started together."""

    number: int = 0
    of: int = 1
    store: Any = None  # a torch.distributed.Store of them all; None: there is no other

    def told_by_first(self, action: Callable[[], T]) -> T:
        """The result of action, which process 0 does; if it fails there, all raise. To be called once."""
        if self.number:
            result, message = pickle.loads(self.store.get("told"))
            if message is not None:
                raise ValueError(f"process 0: {message}")
            return result  # type: ignore[no-any-return]
        try:
            result = action()
        except Exception as error:
            self._tell(None, str(error))
            raise
        self._tell(result, None)
        return result

    def _tell(self, *what: Any) -> None:
        if self.store is not None:
            self.store.set("told", pickle.dumps(what))


def alone() -> Alone:
    """Take this process out of the group that a launcher means it to join, and give it one GPU.

    To be called before anything asks for CUDA devices, or reads the launcher's variables.
    Raises ValueError if the launcher was told to shard models.
    """
    _check_launch()
    process = Alone()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, number, of = next(rendezvous("env://"))
        process = Alone(number, of, store)
        if count := torch.cuda.device_count():
            devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(os.environ["LOCAL_RANK"]) % count]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    return process


def _check_launch() -> None:
    engines = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
    if used := [name for name in engines if os.environ.get(f"ACCELERATE_USE_{name}") == "true"]:
        raise ValueError(
            f"accelerate was told to use {used[0]}, but here every process works with a whole model: start it with "
            "configs/ddp.yaml, or by torchrun"
        )
