"""Steps of DPO beside TRL's DPOTrainer: the same losses and parameters? how long, and in how much memory?"""

import gc
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contest import OUR_RATIO
from benchmarks.harness import attempt, peak_bytes, quartiles, ratio
from benchmarks.real.data import Record
from benchmarks.table import Table, installed
from benchmarks.train_step import OURS, TRL

OUR_CPU_RATIO, OUR_MEMORY_RATIO = "our CPU time / its CPU time", "our memory / its memory"
LOSS_OFF, PARAMETER_OFF, MOVED = (
    "loss, largest difference",
    "parameter, largest difference",
    "parameter, largest change",
)


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


class Run(NamedTuple):
    losses: list[float]
    parameters: list[Tensor]
    seconds: list[float]  # of each step after the warm-up
    cpu_seconds: list[float]  # of all threads
    peak_mib: float  # above model and data


def measure(table: Table, folder: Path, work: Work) -> None:
    """Trainers take turns by whole runs, in the order ours, TRL's, TRL's, ours."""
    runs: dict[str, list[Run]] = {OURS: [], TRL: []}
    for number in range(work.rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            result, status = None, "" if name == OURS or installed(name) else "not installed"
            if not status:
                result, status = attempt(partial(train, name, folder, work))
            if result is None:
                table.add_status(work.question, work.name, name, status, _package(name))
                del runs[name]
            else:
                runs[name].append(result if not runs[name] else result._replace(parameters=[]))
    for name, found in runs.items():
        add = partial(table.add, work.question, work.name, name, package=_package(name))
        add("time", tuple(1e3 * x for x in quartiles(_all(found, "seconds"))), "ms")
        add("CPU time", tuple(1e3 * x for x in quartiles(_all(found, "cpu_seconds"))), "ms")
        add("peak memory", (found[0].peak_mib,), "MiB")
        if name != OURS and OURS in runs:
            _compare(add, runs[OURS], found)
    if OURS in runs:
        first = runs[OURS][0]
        add = partial(table.add, work.question, work.name, OURS)
        add("first loss", (first.losses[0],), "nat")
        add("last loss", (first.losses[-1],), "nat")
        add(MOVED, (_largest(first.parameters, _weights(folder)),), "")


def _compare(add: Any, ours: list[Run], theirs: list[Run]) -> None:
    add(OUR_RATIO, ratio(_all(ours, "seconds"), _all(theirs, "seconds")), "×")
    add(OUR_CPU_RATIO, ratio(_all(ours, "cpu_seconds"), _all(theirs, "cpu_seconds")), "×")
    add(OUR_MEMORY_RATIO, (ours[0].peak_mib / theirs[0].peak_mib,), "×")
    add(LOSS_OFF, (max(abs(a - b) for a, b in zip(ours[0].losses, theirs[0].losses, strict=True)),), "nat")
    add(PARAMETER_OFF, (_largest(ours[0].parameters, theirs[0].parameters),), "")


def train(name: str, folder: Path, work: Work) -> Run:
    """A run of the trainer of this name, in fp32, with the reference's log-probs computed beforehand."""
    from transformers import PrinterCallback, TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[tuple[float, float]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append((time.perf_counter(), time.process_time()))

        on_train_begin = on_step_end

    gc.collect()
    with TemporaryDirectory() as temporary:
        trainer = make_trainer(name, folder, work, Path(temporary))
        stopwatch = Stopwatch()
        trainer.add_callback(stopwatch)
        trainer.remove_callback(PrinterCallback)
        peak = peak_bytes(trainer.train, "cpu")
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(stopwatch.ends[work.warm_up :])]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    parameters = [parameter.detach() for parameter in trainer.model.parameters()]
    return Run(losses, parameters, [wall for wall, _ in steps], [cpu for _, cpu in steps], peak / 2**20)


def make_trainer(name: str, folder: Path, work: Work, temporary: Path, **more: Any) -> Any:
    """DPO (α = 1), all options that both trainers have the same. more: further options."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = dict(
        output_dir=str(temporary / "run"), per_device_train_batch_size=work.pairs, max_steps=work.steps, beta=0.1,
        learning_rate=1e-5, max_length=None, use_cpu=True, bf16=False, gradient_checkpointing=work.checkpointing,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=0, **more,
    )  # fmt: skip
    given: dict[str, Any] = dict(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        train_dataset=Dataset.from_list(list(work.records)),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    if name == OURS:
        from hdpo_train import HDPOConfig, HDPOTrainer

        return HDPOTrainer(args=HDPOConfig(ref_cache_dir=str(temporary / "reference"), **options), **given)
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(args=DPOConfig(precompute_ref_log_probs=True, **options), **given)


def _weights(folder: Path) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    return [each.detach() for each in AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).parameters()]


def _largest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def _all(runs: Sequence[Run], field: str) -> list[float]:
    return [value for run in runs for value in getattr(run, field)]


def _package(name: str) -> str:
    return TRL if name == TRL else ""
