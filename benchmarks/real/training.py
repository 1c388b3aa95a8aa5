"""Steps of DPO beside TRL's DPOTrainer: the same losses and parameters? how long, and in how much memory?"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contest import OUR_RATIO
from benchmarks.harness import attempt, in_fresh_process, quartiles, ratio
from benchmarks.real.data import Record
from benchmarks.table import Table, installed
from benchmarks.train_step import OUR_CPU_RATIO, OUR_MEMORY_RATIO, OURS, TRL, Run, make_trainer, package, timed

LOSS_OFF, PARAMETER_OFF, MOVED = (
    "loss, largest difference",
    "parameter, largest difference",
    "parameter, largest change",
)
Weights = list[Tensor]


class Work(NamedTuple):
    """Optimizer steps on records of one kind."""

    question: str  # "trajectory" or "step"
    name: str
    records: Sequence[Record]
    pairs: int  # of a step
    steps: int
    warm_up: int = 1  # steps that are not timed
    rounds: int = 1  # runs of each trainer
    checkpointing: bool = False  # of activations


def measure(table: Table, folder: Path, work: Work) -> None:
    """Trainers take turns by whole runs, in the order ours, TRL's, TRL's, ours."""
    runs: dict[str, list[Run]] = {OURS: [], TRL: []}
    weights: dict[str, Weights] = {}  # after the first run
    for number in range(work.rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            result, status = None, "" if name == OURS or installed(name) else "not installed"
            if not status:
                result, status = attempt(partial(train, name, folder, work))
            if result is None:
                table.add_status(work.question, work.name, name, status, package(name))
                del runs[name]
            else:
                runs[name].append(result[0])
                weights.setdefault(name, result[1])
    for name, found in runs.items():
        add = partial(table.add, work.question, work.name, name, package=package(name))
        add("time", tuple(1e3 * x for x in quartiles(_all(found, "seconds"))), "ms")
        add("CPU time", tuple(1e3 * x for x in quartiles(_all(found, "cpu_seconds"))), "ms")
        add("peak memory", (found[0].peak_mib,), "MiB")
        if name != OURS and OURS in runs:
            _compare(add, runs[OURS], found)
            add(PARAMETER_OFF, (_largest(weights[OURS], weights[name]),), "")
    if OURS in runs:
        losses, add = runs[OURS][0].losses, partial(table.add, work.question, work.name, OURS)
        add("first loss", (losses[0],), "nat")
        add("last loss", (losses[-1],), "nat")
        add(MOVED, (_largest(weights[OURS], _weights(_model(folder))),), "")


def _compare(add: Any, ours: list[Run], theirs: list[Run]) -> None:
    add(OUR_RATIO, ratio(_all(ours, "seconds"), _all(theirs, "seconds")), "×")
    add(OUR_CPU_RATIO, ratio(_all(ours, "cpu_seconds"), _all(theirs, "cpu_seconds")), "×")
    add(OUR_MEMORY_RATIO, (ours[0].peak_mib / theirs[0].peak_mib,), "×")
    add(LOSS_OFF, (max(abs(a - b) for a, b in zip(ours[0].losses, theirs[0].losses, strict=True)),), "nat")


def train(name: str, folder: Path, work: Work) -> tuple[Run, Weights]:
    """A run in fp32 of the trainer of this name, in a process of its own, and the model's weights after it."""
    with TemporaryDirectory() as temporary:
        run = in_fresh_process(_train, name, folder, work, Path(temporary))
        return run, torch.load(Path(temporary) / "weights.pt", weights_only=True)


def _train(name: str, folder: Path, work: Work, temporary: Path) -> Run:
    from transformers import AutoTokenizer

    options = dict(
        per_device_train_batch_size=work.pairs,
        max_steps=work.steps,
        learning_rate=1e-5,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=work.checkpointing,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = make_trainer(name, temporary, _model(folder), tokenizer, work.records, options)
    run = timed(trainer, "cpu", work.warm_up)
    torch.save(_weights(trainer.model), temporary / "weights.pt")
    return run


def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _weights(model: Any) -> Weights:
    return [parameter.detach() for parameter in model.parameters()]


def _largest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def _all(runs: Sequence[Run], field: str) -> list[float]:
    return [value for run in runs for value in getattr(run, field)]
