"""Runs that go on: one process a folder, one checkpoint for all ranks, a word on what has changed, and an end.

lock the folder ── choose the checkpoint, all ranks together ── compare options ── claim the folder ── train
"""

import contextlib
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.utils import logging

from hdpo_train.data.tokenize import killed_workers_named
from hdpo_train.metrics import finite
from hdpo_train.ranks import gathered, shards, together
from hdpo_train.run.checkpoints import WholeCheckpoints, remove_leftovers
from hdpo_train.run.lock import lock, locked, unlock
from hdpo_train.run.output_dir import (
    agree,
    claim_output_dir,
    interrupted,
    last_finite,
    look,
    refuse_base_model,
    refuse_broken,
    refuse_other_run,
)
from hdpo_train.run.report import read_metrics
from hdpo_train.run.run_record import RUN_FILE, differences, ended_at, options_of, read_options, write_record
from hdpo_train.run.sigterm import StopAtSigterm
from hdpo_train.run.whole import checkpoint_problem, weight_files

logger = logging.get_logger(__name__)
_UNREADABLE = (
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
    OSError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    SafetensorError,
)
_HYPERPARAMETERS = ("weight_decay", "betas", "eps", "momentum")  # of a parameter group, set by options


class ResumableTrainer(WholeCheckpoints):
    """Trainer whose `train` goes on with a run that was interrupted as if nothing had happened."""

    _options: dict[str, Any] | None = None  # what the run was started with
    _has_ended = False  # by this call of train
    _had_ended = False  # before it

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; resume_from_checkpoint: a checkpoint folder, or True for the last whole one in output_dir (from the
        beginning if there is none; a run that has ended is loaded and left as it is). Default: that of the config.

        output_dir is locked until `save_model` is done, training fails, or the process ends.

        Raises FileExistsError if another process has output_dir, or it holds another run that this one does not
        resume; ValueError, naming file and rank, if the checkpoint is not whole on every rank, or is of another
        optimizer; OSError if a checkpoint cannot be written; the one before stays. FloatingPointError and
        KeyboardInterrupt say how to go on.
        """
        output_dir = str(self.args.output_dir)
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        check_disks(self.args)
        together(self._take_folder)
        with self._says_how_to_go_on(), self._stop_at_sigterm():
            return self._train(output_dir, resume_from_checkpoint, *args, **kwargs)

    def _train(self, output_dir: str, resume_from: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        self._has_ended = self._had_ended = False
        folder, options = Path(output_dir), self._started_with()
        checkpoint = None
        if str(resume_from).lower() == "true":
            refuse_save_only_model(self.args)
            if all(gather_object([self._is_done(folder, options)])):
                return self._load_ended_run(folder, options)
            checkpoint, problems = agree(output_dir, gather_object([look(output_dir, *self._rank())]))
            if checkpoint is None:
                self._say(f"no checkpoint in {output_dir}: starting from the beginning")
            elif problems:
                self._say(f"not whole: {'; '.join(problems)}. Going on from {checkpoint}")
        elif resume_from:
            checkpoint = str(resume_from)
            refuse_broken(output_dir, checkpoint, gather_object([checkpoint_problem(Path(checkpoint), *self._rank())]))
        together(lambda: self._claim(output_dir, checkpoint))
        if checkpoint is not None:
            self._say_what_has_changed(checkpoint, options)
        together(lambda: write_record(folder, options) if self.args.should_save else None)
        with killed_workers_named("dataloader_num_workers", self.args.dataloader_num_workers):
            result = super().train(checkpoint, *args, **kwargs)
        self._has_ended = True
        return result

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        is_own = folder == Path(str(self.args.output_dir))
        with self._says_how_to_go_on(), locked(folder) if self.args.should_save else contextlib.nullcontext():
            if is_own and self._had_ended:  # it lies there
                return
            super().save_model(output_dir, _internal_call)
            if is_own and self._has_ended and self._options is not None and self.args.should_save:
                write_record(folder, self._options, ended=self.state.global_step)
            if is_own:
                self.create_model_card()

    @contextlib.contextmanager
    def _says_how_to_go_on(self) -> Iterator[None]:
        """Whatever ends the run frees its folder, and says how to resume."""
        output_dir = str(self.args.output_dir)
        try:
            yield
        except BaseException as error:
            if self.args.should_save:
                unlock(output_dir)
            if isinstance(error, FloatingPointError):
                raise FloatingPointError(f"{error}. {last_finite(output_dir)}") from error
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(interrupted(output_dir, self.state)) from None
            raise

    def _stop_at_sigterm(self) -> contextlib.AbstractContextManager[None]:
        stops = [each for each in self.callback_handler.callbacks if isinstance(each, StopAtSigterm)]
        return stops[0].listening() if stops else contextlib.nullcontext()

    def _say(self, message: str) -> None:
        if self.is_world_process_zero():
            logger.warning(message)

    def _rank(self) -> tuple[int, int]:
        return self.args.process_index, self.args.world_size

    def _take_folder(self) -> None:
        if self.args.should_save:
            lock(str(self.args.output_dir))
            remove_leftovers(str(self.args.output_dir))

    def _claim(self, output_dir: str, checkpoint: str | None) -> None:
        """Take the folder for this run; one that holds another run is refused."""
        goes_on = checkpoint is not None and Path(checkpoint).resolve().parent == Path(output_dir).resolve()
        if self.args.should_save and not goes_on:
            claim_output_dir(output_dir, self.args.overwrite_output_dir)  # type: ignore[attr-defined]

    def _started_with(self) -> dict[str, Any]:
        """What the run was started with, taken at the first call: later calls find trained weights."""
        if self._options is None:
            evaluations = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
            named = {"train": self.train_dataset, **evaluations}.items()
            sets: Any = {name: dataset for name, dataset in named if dataset is not None}
            given = (self.args, self.model, self.processing_class, sets, self.optimizer)
            with gathered(self.model):  # type: ignore[arg-type]
                mine = together(lambda: options_of(*given) if self.args.should_save else None)  # type: ignore[arg-type]
            self._options = gather_object([mine])[0]
        return self._options  # type: ignore[return-value]

    def _say_what_has_changed(self, checkpoint: str, options: dict[str, Any]) -> None:
        before = read_options(Path(checkpoint))
        if not before:
            self._say(f"{checkpoint} has no {RUN_FILE}: what has changed since is not known")
        elif changes := differences(before, options):
            self._say(f"{checkpoint} was written with other options; from here on: {'; '.join(changes)}")

    # ---- a run that has ended ----

    def _is_done(self, folder: Path, options: dict[str, Any]) -> bool:
        return bool(weight_files(folder)) and not self._is_sharded() and ended_at(folder, options) is not None

    def _load_ended_run(self, folder: Path, options: dict[str, Any]) -> TrainOutput:
        self._load_from_checkpoint(str(folder))
        self.state.global_step = ended_at(folder, options) or 0
        self._had_ended = True
        self._say(f"{folder} holds this run, and it has ended at step {self.state.global_step}: nothing to do")
        self._say_what_has_changed(str(folder), options)
        summary = next((line for line in read_metrics(folder)[::-1] if "train_runtime" in line), {})
        return TrainOutput(self.state.global_step, summary.get("train_loss", 0.0), summary)

    def _is_sharded(self) -> bool:
        return shards(self.accelerator) or self.is_fsdp_enabled

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end, which need not be that of an epoch
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # ---- what a checkpoint holds ----

    def _add_to_checkpoint(self, folder: Path) -> None:
        super()._add_to_checkpoint(folder)
        if self._options is not None:
            write_record(folder, self._options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _explained(resume_from_checkpoint, "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not finite(self.model, self.accelerator):  # type: ignore[arg-type]
            raise FloatingPointError(f"{resume_from_checkpoint} is broken: some of its weights are NaN or infinite")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer: Any = self.optimizer
        if checkpoint is None or self._is_sharded():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        fresh = [dict(group) for group in optimizer.param_groups]
        with _explained(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
        for group, now in zip(optimizer.param_groups, fresh, strict=True):
            if group.keys() != now.keys():
                before, optim = read_options(Path(checkpoint)).get("optim", "another"), self._started_with()["optim"]
                raise ValueError(
                    f"cannot resume from {checkpoint}: its optimizer is {before}, whose state does not fit --optim "
                    f"{optim}. Resume with --optim {before}, or start from the beginning in another output_dir"
                )
            group.update({name: now[name] for name in _HYPERPARAMETERS if name in now})
        self._schedule_by_options([group.get("initial_lr") for group in fresh])

    def _schedule_by_options(self, rates: list[Any]) -> None:
        """Use the options' learning rate at this point of the schedule, not the one in the checkpoint."""
        scheduler: Any = self.lr_scheduler
        if not isinstance(scheduler, LambdaLR):
            return
        scheduler.base_lrs = rates
        scheduler._last_lr = [
            rate * at(scheduler.last_epoch) for rate, at in zip(rates, scheduler.lr_lambdas, strict=True)
        ]
        for group, initial, rate in zip(self.optimizer.param_groups, rates, scheduler._last_lr, strict=True):  # type: ignore[union-attr]
            group.update(initial_lr=initial, lr=rate)


@contextlib.contextmanager
def taken_output_dir(args: Any, names: list[str | None]) -> Iterator[None]:
    """Hold the folder, and refuse what `train` would refuse, before any model is loaded.

    args: HDPOConfig. names: of the models that the run starts from.
    """
    output_dir, resume_from = str(args.output_dir), args.resume_from_checkpoint
    refuse_base_model(output_dir, names)
    check_disks(args)

    def take() -> None:
        if args.should_save:
            lock(output_dir)
            if not resume_from:
                refuse_other_run(output_dir, args.overwrite_output_dir)
        if str(resume_from).lower() == "true":
            refuse_save_only_model(args)
        elif resume_from:
            problem = checkpoint_problem(Path(resume_from), args.process_index, args.world_size)
            refuse_broken(output_dir, resume_from, [problem])

    together(take)
    try:
        yield
    finally:
        if args.should_save:
            unlock(output_dir)


def refuse_save_only_model(args: TrainingArguments) -> None:
    if args.save_only_model:
        raise ValueError(
            "save_only_model leaves checkpoints that cannot be resumed from: leave out save_only_model, or "
            "resume_from_checkpoint"
        )


def check_disks(args: TrainingArguments) -> None:
    """ValueError if checkpoints would be written in part, where a rank does not see the folder that they are saved to.

    With save_on_each_node every machine has a folder of its own, else all have one.
    """
    if args.world_size == 1 or args.save_strategy == SaveStrategy.NO:
        return
    folder, mine = Path(str(args.output_dir)), f"_seen-{uuid4().hex}" if args.should_save else None

    def leave() -> None:
        if mine is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / mine).touch()

    together(leave)
    names = [name for name in gather_object([mine]) if name is not None]
    seen = gather_object([sum((folder / name).exists() for name in names)])
    if mine is not None:
        (folder / mine).unlink()
    for rank, number in enumerate(seen):
        if number == 0:
            raise ValueError(
                f"rank {rank} does not see the folder {folder} that checkpoints are saved to, so that it could not "
                "resume: choose an output_dir that all machines share, or --save_on_each_node true where each has one"
            )
        if number > 1:
            raise ValueError(
                f"save_on_each_node is for machines that have a disk each, but rank {rank} sees the {folder} of "
                f"{number} of them: leave it out"
            )


@contextlib.contextmanager
def _explained(checkpoint: str, what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        first = next(iter(f"{error}".strip().splitlines()), repr(error))
        raise ValueError(
            f"cannot resume from {checkpoint}: {what} cannot be loaded ({first}). They are damaged, or of another "
            "model or optimizer"
        ) from error
