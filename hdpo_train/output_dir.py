"""A run's folder: refused where it holds another run, its checkpoints checked before one is resumed."""

import json
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.utils import logging

from hdpo_train.report import METRICS_FILE, REPORT_FILE

logger = logging.get_logger(__name__)


def claim_output_dir(output_dir: str, overwrite: bool) -> None:
    """Make sure that no other run's results are mixed with this one's; FileExistsError if they would be.

    Metrics alone are of a run that was killed before its first checkpoint. It can only start again: they are set aside.
    """
    folder = Path(output_dir)
    results = ("checkpoint-*", METRICS_FILE, REPORT_FILE, "*.safetensors")
    others = [path for pattern in results for path in folder.glob(pattern)]
    if not others:
        return
    if [path.name for path in others] == [METRICS_FILE]:
        aside = folder / f"{METRICS_FILE}.old"
        others[0].replace(aside)
        logger.warning(f"{folder} holds a run that ended before its first checkpoint; its metrics are now {aside.name}")
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} holds another run ({', '.join(sorted(p.name for p in others)[:3])} …): choose another "
            "output_dir, go on with that run (--resume_from_checkpoint true), or delete it (--overwrite_output_dir)"
        )
    for path in others:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def checkpoint_to_resume(output_dir: str, resume_from: str | bool) -> str | None:
    """A checkpoint folder that is whole: the one given (ValueError says what is broken), or for true the last one.

    None for true where there is no checkpoint: one command starts a run and goes on with it, whenever it was killed.
    """
    if resume_from is True or str(resume_from).lower() == "true":
        return _last_whole_checkpoint(Path(output_dir))
    resume_from = str(resume_from)
    problem = checkpoint_problem(Path(resume_from))
    if problem:
        whole = [str(p) for p in sorted(Path(output_dir).glob("checkpoint-*")) if not checkpoint_problem(p)]
        way_out = f"; whole checkpoints there: {', '.join(whole)}" if whole else ""
        raise ValueError(f"cannot resume from {resume_from}: {problem}{way_out}")
    return resume_from


def _last_whole_checkpoint(folder: Path) -> str | None:
    last, problems = look_for_checkpoints(folder)
    if last is not None:
        if problems:
            logger.warning(f"not whole: {'; '.join(problems)}. Going on from {last}")
        return str(last)
    if not problems:
        logger.warning(f"no checkpoint in {folder}: starting from the beginning")
        return None
    raise ValueError(
        f"no checkpoint in {folder} is whole: {'; '.join(problems)}. Choose another output_dir, or start from the "
        "beginning (--overwrite_output_dir true, without --resume_from_checkpoint)"
    )


def look_for_checkpoints(folder: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint, and what is wrong with those after it."""
    steps = {step: path for path in folder.glob("checkpoint-*") if (step := step_of(path)) is not None}
    problems: list[str] = []
    for _, path in sorted(steps.items(), reverse=True):
        problem = checkpoint_problem(path)
        if problem is None:
            return path, problems
        problems.append(f"{path}: {problem}")
    return None, problems


def interrupted(output_dir: str, state: TrainerState) -> str:
    """Where a run that was interrupted stands, and how to go on with it."""
    last, _ = look_for_checkpoints(Path(output_dir))
    go_on = f"{last} is whole: --resume_from_checkpoint true goes on from it" if last else "there is no checkpoint yet"
    return f"interrupted at step {state.global_step} of {state.max_steps}; {go_on}"


def step_of(path: Path) -> int | None:
    """N of a folder checkpoint-N, or None."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match and path.is_dir() else None


def checkpoint_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads headers and directories, not the weights."""
    if not folder.is_dir():
        return "no such folder"
    state = folder / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{state.name} cannot be read ({error})"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} is not whole ({error})"
    for name in ("optimizer.pt", "scheduler.pt"):  # zip files: their directory is at the end
        path = folder / name
        if path.exists() and not zipfile.is_zipfile(path):
            return f"{name} is not whole"
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("global_step*")) or any(folder.glob("pytorch_*"))
    return None if has_weights else "it holds no weights"
