"""A run's folder: refused where it holds another run, its checkpoints checked before one is resumed."""

import json
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from hdpo_train.report import METRICS_FILE


def claim_output_dir(output_dir: str, overwrite: bool) -> None:
    """Make sure that no other run's results are mixed with this one's; FileExistsError if they would be."""
    folder = Path(output_dir)
    others = [path for pattern in ("checkpoint-*", METRICS_FILE, "*.safetensors") for path in folder.glob(pattern)]
    if not others:
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} holds another run ({', '.join(sorted(p.name for p in others)[:3])} …): choose another "
            "output_dir, go on with that run (--resume_from_checkpoint true), or delete it (--overwrite_output_dir)"
        )
    for path in others:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def checkpoint_to_resume(output_dir: str, resume_from: str | bool) -> str:
    """The checkpoint folder, checked; ValueError names what is missing or broken, and those that are whole."""
    if resume_from is True or str(resume_from).lower() == "true":
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if last is None:
            raise ValueError(f"no checkpoint in {output_dir}; leave out --resume_from_checkpoint to start")
        resume_from = last
    resume_from = str(resume_from)
    problem = checkpoint_problem(Path(resume_from))
    if problem:
        whole = [str(p) for p in sorted(Path(output_dir).glob("checkpoint-*")) if not checkpoint_problem(p)]
        way_out = f"; whole checkpoints there: {', '.join(whole)}" if whole else ""
        raise ValueError(f"cannot resume from {resume_from}: {problem}{way_out}")
    return resume_from


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
