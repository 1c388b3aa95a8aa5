"""Checkpoints, and the model at the end, that are whole or not there: written in a folder of their own, named when
complete.

transformers writes a checkpoint where it stays. Here it writes into `_partial/checkpoint-N`; when every rank is done
and the disk has it, the folder is renamed to `checkpoint-N`: one step, for whoever looks and for `kill -9`. Only then
are old ones deleted. A model is saved into a folder that may hold an older one: its files are moved there when all are
written.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hdpo_train.files import readable
from hdpo_train.run.whole import look_for_checkpoints, shards_of, step_of

logger = logging.get_logger(__name__)
PARTIAL_DIR = "_partial"  # with an underscore: Trainer.push_to_hub leaves it out
_MODEL = "model"  # in it: the files of a model that is being saved
_REPLACED = "replaced"  # in it: a folder whose name is being given to a new one
_INDEX = ".safetensors.index.json"


class WholeCheckpoints(Trainer):
    """Trainer whose checkpoints appear under their name when they are complete, and in no other state."""

    _writing = False

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, PARTIAL_DIR) if self._writing else run_dir

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writing:  # the upload goes on while training does: from the folder that stays
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial = Path(run_dir) / PARTIAL_DIR / name
        with self._explained(name, run_dir, partial):
            self._writing = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing = False
            self._name_best(run_dir)
            if self.args.should_save:
                self._add_to_checkpoint(partial)
            self.accelerator.wait_for_everyone()  # each rank writes files of its own
            if self.args.should_save:
                put_in_place(partial, Path(run_dir) / name)
                rotate(Path(run_dir), self.state.global_step, self.args.save_total_limit, self.state.best_global_step)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_dir, name))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or str(self.args.output_dir)
        with self._explained("the model", folder, Path(folder) / PARTIAL_DIR / _MODEL):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._writing:
            with self._on_each_node():
                super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        partial = folder / PARTIAL_DIR / _MODEL
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
        with self._on_each_node():
            super()._save(str(partial), state_dict)
        if self.args.should_save:
            move_in(partial, folder)

    @contextmanager
    def _on_each_node(self) -> Iterator[None]:
        """--save_on_each_node for the weights too: transformers' models write them on rank 0 alone, as of 5.23."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if not self.args.save_on_each_node or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            yield
            return
        model.should_save_on_this_rank = bool
        try:
            yield
        finally:
            del model.should_save_on_this_rank

    def _add_to_checkpoint(self, folder: Path) -> None:
        """Add what a checkpoint needs beside transformers' own files."""
        self.state.save_to_json(str(folder / "trainer_state.json"))  # again: it names the best checkpoint

    def _name_best(self, run_dir: str) -> None:
        """Let the trainer's state name the best checkpoint as it will be called once it is written."""
        if not self.state.best_global_step:
            return
        best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if self.state.best_global_step == self.state.global_step or os.path.isdir(best):
            self.state.best_model_checkpoint = best

    @contextmanager
    def _explained(self, what: str, folder: str, partial: Path | None = None) -> Iterator[None]:
        """OSError with numbers and a way out, for a write that the disk refuses; `partial` is removed."""
        try:
            yield
        except Exception as error:
            cause = refused_write(error)
            if cause is None:
                raise
            if partial is not None and self.args.should_save:
                shutil.rmtree(partial.parent, ignore_errors=True)
            run_dir = str(self.args.output_dir)
            last, _ = look_for_checkpoints(Path(run_dir))
            if last:
                takes = f"the last checkpoint took {readable(_size(last))}"
                go_on = f"; {last} is whole, --resume_from_checkpoint true goes on from it"
            else:
                assert isinstance(self.model, nn.Module)
                weights = sum(parameter.nbytes for parameter in self.model.parameters())
                takes, go_on = f"the weights alone are {readable(weights)}", ""
            raise OSError(
                f"{what} could not be written to {folder}: {cause}. Free there: {readable(_free(folder))}; {takes}. "
                "Make room, keep fewer checkpoints (--save_total_limit; while one is written, it comes on top), or "
                f"choose another --output_dir{go_on}"
            ) from error


def put_in_place(partial: Path, final: Path) -> None:
    """Give a complete folder its name. A folder that has it (of a run resumed before it) is there until then."""
    _to_disk(partial)
    if final.exists():
        replaced = partial.parent / _REPLACED / final.name
        replaced.parent.mkdir(exist_ok=True)
        os.rename(final, replaced)
    os.rename(partial, final)
    _sync(final.parent)
    shutil.rmtree(partial.parent, ignore_errors=True)


def move_in(partial: Path, folder: Path) -> None:
    """Move a complete model's files to where an older one may be: at no moment does a mixture of both load.

    Weights come last, and after them their index, without which shards are no model.
    """
    _to_disk(partial)
    new = sorted(partial.iterdir(), key=lambda path: (path.name.endswith(_INDEX), ".safetensors" in path.name))
    names = {path.name for path in new}
    if any(name.startswith("model") for name in names):  # an adapter may lie beside a whole model
        _remove_shards(folder)
    for path in new:
        final = folder / path.name
        if path.name == "README.md" and final.exists():  # peft writes one: what someone has made of it stays
            continue
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(path, final)
    if f"model{_INDEX}" in names:
        (folder / "model.safetensors").unlink(missing_ok=True)
    _sync(folder)
    shutil.rmtree(partial.parent, ignore_errors=True)


def _remove_shards(folder: Path) -> None:
    """Remove the files that an index names. The index goes first: without it they are no model."""
    index, aside = folder / f"model{_INDEX}", folder / f"_{_REPLACED}{_INDEX}"
    if index.exists() and not aside.exists():  # else the one that was killed here before goes on
        os.replace(index, aside)
    if aside.exists():
        for shard in shards_of(aside):
            shard.unlink(missing_ok=True)
        aside.unlink()


def rotate(run_dir: Path, step: int, limit: int | None, best_step: int | None) -> None:
    """Delete checkpoints until `limit` are left, oldest first; never those of `step` and `best_step`."""
    if not limit or limit <= 0:
        return
    steps = {number: path for path in run_dir.iterdir() if (number := step_of(path)) is not None}
    # Later ones than this are of a run that was resumed before them: they go first.
    oldest_first = sorted(steps.keys() - {step, best_step}, key=lambda number: (number < step, number))
    trash = run_dir / PARTIAL_DIR
    for number in oldest_first[: max(0, len(steps) - limit)]:
        trash.mkdir(exist_ok=True)
        os.rename(steps[number], trash / steps[number].name)  # a half-deleted one never has a checkpoint's name
    shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(output_dir: str) -> None:
    """Remove what is left of a run that was killed while it wrote or deleted a checkpoint."""
    trash = Path(output_dir) / PARTIAL_DIR
    if not trash.is_dir():
        return
    for replaced in (trash / _REPLACED).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        final = Path(output_dir) / replaced.name
        if not final.exists():  # killed between two renames
            os.rename(replaced, final)
    names = ", ".join(sorted(path.name for path in trash.iterdir() if path.name != _REPLACED))
    logger.warning(f"removing {trash} ({names}): left by a run that was killed while it wrote or deleted checkpoints")
    shutil.rmtree(trash, ignore_errors=True)


def refused_write(error: BaseException) -> str | None:
    """The reason, if this error means that the disk is full or fails; None for any other error."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    if isinstance(error, OSError) and error.errno in numbers:
        return os.strerror(error.errno)
    found = re.search(r"\(os error (\d+)\)", str(error))  # of safetensors and tokenizers
    if found and int(found[1]) in numbers:
        return os.strerror(int(found[1]))
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", str(error)):
        return "a write of torch.save failed"  # it does not say why
    return None


def _to_disk(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _free(folder: str) -> int:
    path = Path(folder).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
