"""Whether a checkpoint is whole: everything that resuming needs is there, as far as names and headers tell.

weights      model or adapter: one file, an index and all its shards, or folders of adapters
training     optimizer.pt, scheduler.pt, and random numbers of every rank
FSDP         pytorch_model_fsdp* and optimizer* in place of weights and optimizer.pt
DeepSpeed    global_step*, which `latest` names, in place of all of these but the random numbers
state        trainer_state.json
"""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hdpo_train.run.run_record import read_options

_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def step_of(path: Path) -> int | None:
    """N of a folder checkpoint-N, or None."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match and path.is_dir() else None


def checkpoints(folder: Path) -> list[Path]:
    """All of them, whole or not, the last one first."""
    steps = {path: step for path in folder.glob("checkpoint-*") if (step := step_of(path)) is not None}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def look_for_checkpoints(folder: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint, and what is wrong with those after it."""
    problems: list[str] = []
    for path in checkpoints(folder):
        problem = checkpoint_problem(path)
        if problem is None:
            return path, problems
        problems.append(f"{path}: {problem}")
    return None, problems


def weight_files(folder: Path) -> list[Path]:
    """The files of the model or adapter that lies in a folder, the index and its shards included; no others."""
    found = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    for index in (folder / name for name in _INDICES):
        if index.is_file():
            found += [index, *(shard for shard in shards_of(index) if shard.is_file())]
    return found


def shards_of(index: Path) -> list[Path]:
    """The files that an index names; none if it cannot be read."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return [index.parent / Path(name).name for name in sorted(names)]


def checkpoint_problem(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """Why a rank, of so many, cannot resume from this folder; None if it can. Weights themselves are not read."""
    if not folder.is_dir():
        return "no such folder"
    return next(_problems(folder, rank, ranks), None)


def _problems(folder: Path, rank: int, ranks: int) -> Iterator[str]:
    yield from _problems_of_state(folder / "trainer_state.json")
    kinds = ("*.safetensors", "*model*.bin", "optimizer.bin", "*.pt", "rng_state*.pth")
    for path in (path for kind in kinds for path in sorted(folder.rglob(kind))):
        if (problem := _problem_of_file(path)) is not None:
            yield f"{path.relative_to(folder)} is not whole{problem}"
    random_numbers = {path.name for path in folder.glob("rng_state*.pth")}
    if any(folder.glob("global_step*")) or (folder / "latest").exists():
        yield from _problems_of_deepspeed(folder)
    else:
        fsdp = [*folder.glob("pytorch_model_fsdp*")]
        if not (fsdp or weight_files(folder) or any(map(weight_files, folder.glob("*/")))):
            yield "it holds no weights"
        for index in (folder / name for name in _INDICES if (folder / name).exists()):
            if not shards_of(index):
                yield f"{index.name} cannot be read"
            yield from (f"{shard.name} is missing" for shard in shards_of(index) if not shard.exists())
        optimizer = [*folder.glob("optimizer*")]
        if not (optimizer or random_numbers or (folder / "scheduler.pt").exists()):
            yield "it was saved with save_only_model, so that it can be loaded but not resumed from"
        for path in (path for path in (*fsdp, *optimizer) if path.is_dir() and not (path / ".metadata").exists()):
            yield f"{path.name}/.metadata is missing"
        if not optimizer:
            yield "optimizer.pt is missing"
        if not (folder / "scheduler.pt").exists():
            yield "scheduler.pt is missing"
    yield from _problems_of_random_numbers(folder, random_numbers, rank, ranks)


def _problems_of_state(path: Path) -> Iterator[str]:
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        yield f"{path.name} cannot be read ({error})"
        return
    if not isinstance(state, dict):
        yield f"{path.name} holds no object"
    elif not isinstance(state.get("global_step"), int) or not isinstance(state.get("log_history"), list):
        yield f"{path.name} lacks global_step or log_history"


def _problem_of_file(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return None
        except (SafetensorError, OSError) as error:
            return f" ({error})"
    return None if zipfile.is_zipfile(path) else ""  # of torch.save; the directory is at the end


def _problems_of_deepspeed(folder: Path) -> Iterator[str]:
    latest = folder / "latest"
    tag = latest.read_text().strip() if latest.is_file() else ""
    if not tag:
        yield "latest is missing"
    for kind in ("*model_states.pt", "*optim_states.pt"):
        if not any((folder / tag).glob(kind)):
            yield f"{tag}/{kind} is missing"


def _problems_of_random_numbers(folder: Path, found: set[str], rank: int, ranks: int) -> Iterator[str]:
    """What is wrong with random states. With another number of ranks there are none to restore: no damage."""
    saved_by = read_options(folder).get("processes", 1 if found == {"rng_state.pth"} else len(found))
    needed = "rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"
    if not found or (saved_by == ranks and needed not in found):
        yield f"{needed} is missing"


def has_finite_weights(folder: Path) -> bool:
    """Whether every number in the folder's safetensors is finite. Reads all of them."""
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    return False
    return True
