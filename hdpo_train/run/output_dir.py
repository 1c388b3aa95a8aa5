"""A run's folder: never the base model's, refused where it holds another run, and the checkpoint to go on from."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import TrainerState
from transformers.utils import logging

from hdpo_train.run.report import METRICS_FILE, REPORT_FILE
from hdpo_train.run.run_record import RUN_FILE, read_options
from hdpo_train.run.whole import (
    checkpoint_problem,
    checkpoints,
    has_finite_weights,
    look_for_checkpoints,
    step_of,
    weight_files,
)

logger = logging.get_logger(__name__)


def refuse_base_model(output_dir: str, names: Iterable[str | None]) -> None:
    """ValueError if a model or tokenizer that the run starts from lies where the run would write, and delete.

    names: folders or hub ids. Links are followed.
    """
    folder = Path(output_dir)
    for name in names:
        base = Path(name or "").resolve()
        if not name or not base.exists() or not folder.exists():
            continue
        above = next((path for path in (base, *base.parents) if path.samefile(folder)), None)
        if above is not None and (above == base or step_of(above / base.relative_to(above).parts[0]) is not None):
            raise ValueError(
                f"output_dir {output_dir} holds {name}, which this run starts from and would overwrite: choose another "
                "output_dir"
            )


def refuse_other_run(output_dir: str, overwrite: bool) -> list[Path]:
    """The files of other runs in the folder: those that runs write, no others.

    FileExistsError if there is any, unless it is to be overwritten or of a run without a checkpoint; always if no run
    of this trainer has left it.
    """
    folder = Path(output_dir)
    found = [*checkpoints(folder), *weight_files(folder)]
    records = [folder / name for name in (METRICS_FILE, REPORT_FILE, RUN_FILE) if (folder / name).exists()]
    if found or (folder / REPORT_FILE).exists():
        names = ", ".join(sorted(path.name for path in (*found, *records))[:3])
        if not overwrite:
            raise FileExistsError(
                f"{folder} holds another run ({names} …): choose another output_dir, go on with that run "
                "(--resume_from_checkpoint true), or delete it (--overwrite_output_dir)"
            )
        if not records:
            raise FileExistsError(
                f"{folder} holds {names}, but no {RUN_FILE} or {METRICS_FILE}: no run has left it, and "
                "--overwrite_output_dir deletes only runs. Choose another output_dir"
            )
    return [*found, *records]


def claim_output_dir(output_dir: str, overwrite: bool) -> None:
    """Make sure that no other run's results are mixed with this one's; FileExistsError if they would be.

    Metrics alone are of a run that was killed before its first checkpoint. It can only start again: they are set aside.
    """
    folder, others = Path(output_dir), refuse_other_run(output_dir, overwrite)
    if {path.name for path in others} <= {METRICS_FILE, RUN_FILE}:
        if folder / METRICS_FILE in others:
            aside = folder / f"{METRICS_FILE}.old"
            (folder / METRICS_FILE).replace(aside)
            logger.warning(
                f"{folder} holds a run that ended before its first checkpoint; its metrics are now {aside.name}"
            )
        return
    for path in others:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class Sight(NamedTuple):
    """The checkpoints that a rank can see: for a whole one its options, for another what is wrong with it."""

    whole: Mapping[int, str]
    problems: Mapping[int, str]


def look(output_dir: str, rank: int = 0, ranks: int = 1) -> Sight:
    whole, problems = {}, {}
    for path in checkpoints(Path(output_dir)):
        step, problem = int(path.name.split("-")[1]), checkpoint_problem(path, rank, ranks)
        if problem is None:
            whole[step] = repr(read_options(path))
        else:
            problems[step] = problem
    return Sight(whole, problems)


def agree(output_dir: str, sights: Sequence[Sight]) -> tuple[str | None, list[str]]:
    """The last checkpoint that is whole for every rank, and what is wrong with later ones; None if nobody sees any.

    ValueError if there are some, but none that all can resume from: with what which rank lacks.
    """
    problems: list[str] = []
    for step in sorted({step for sight in sights for step in (*sight.whole, *sight.problems)}, reverse=True):
        path, before = Path(output_dir) / f"checkpoint-{step}", len(problems)
        for rank, (whole, wrong) in enumerate(sights):
            problem = None if step in whole else wrong.get(step, "no such folder")
            if problem is None and whole[step] != sights[0].whole.get(step, whole[step]):
                problem = "written with other options than that of rank 0"
            if problem is not None:
                problems.append(f"{path}: {problem}" if len(sights) == 1 else f"{path} of rank {rank}: {problem}")
        if len(problems) == before:
            return str(path), problems
    if not problems:
        return None, []
    raise ValueError(
        f"no checkpoint in {output_dir} is whole: {'; '.join(problems)}. Choose another output_dir, or start from the "
        "beginning (--overwrite_output_dir true, without --resume_from_checkpoint)"
    )


def refuse_broken(output_dir: str, checkpoint: str, problems: Sequence[str | None]) -> None:
    """Raise ValueError if a checkpoint is not whole for every rank. problems: what each rank finds."""
    told = [
        problem if len(problems) == 1 else f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem
    ]
    if told:
        whole = [str(path) for path in reversed(checkpoints(Path(output_dir))) if not checkpoint_problem(path)]
        way_out = f"; whole checkpoints there: {', '.join(whole)}" if whole else ""
        raise ValueError(f"cannot resume from {checkpoint}: {'; '.join(told)}{way_out}")


def interrupted(output_dir: str, state: TrainerState) -> str:
    """Where a run that was interrupted stands, and how to go on with it."""
    last, _ = look_for_checkpoints(Path(output_dir))
    go_on = f"{last} is whole: --resume_from_checkpoint true goes on from it" if last else "there is no checkpoint yet"
    at = f"at step {state.global_step} of {state.max_steps}" if state.max_steps else "before the first step"
    return f"interrupted {at}; {go_on}"


def last_finite(output_dir: str) -> str:
    """Which checkpoint to go back to when a run has diverged. Reads weights until it finds a good one."""
    broken: list[str] = []
    for path in checkpoints(Path(output_dir)):
        if checkpoint_problem(path) is not None:
            continue
        if has_finite_weights(path):
            told = f"{', '.join(broken)} cannot be gone on from: weights that are not finite. " if broken else ""
            return f"{told}The last good checkpoint: --resume_from_checkpoint {path}"
        broken.append(str(path))
    return f"{', '.join(broken)}: weights that are not finite. Start again" if broken else "There is no checkpoint yet"


def check_output_dir(name: str, option: str = "--output_dir") -> Path:
    """The folder, which need not exist. Raises ValueError or OSError if nothing can be written there."""
    folder = Path(name)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{option} {folder}: {nearest} is a file, not a folder; choose another name")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {folder}: you may not write to {nearest}; choose another folder")
    return folder
