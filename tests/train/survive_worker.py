"""Run by test_survives.py: runs the command line in forks of itself, which die, or run out of disk, when told to.

Reads jobs as JSON lines, {"argv", "moment", "log", "ranks", …}, and answers each with the exit codes of its processes
(-9: killed). A fork costs no imports.
"""

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from transformers import Trainer, TrainerState

from hdpo_train.cli.main import main
from tests.train import tiny  # noqa: F401 - imports the models


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(owner, name: str, when, before=None, after=None) -> None:
    """Call `before` and `after` around those calls of owner.name whose arguments `when` accepts."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        hit = when(*args, **kwargs)
        if hit and before:
            before(*args, **kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            if hit and after:
                after(*args, **kwargs)

    setattr(owner, name, wrapped)


def cut(path) -> None:
    """What a kill in the middle of writing a file leaves."""
    os.truncate(path, os.path.getsize(path) // 2)
    die()


def in_checkpoint(step: int, name: str):
    return lambda *args, **_: any(
        str(a).endswith(f"checkpoint-{step}/{name}") for a in args if isinstance(a, str | Path)
    )


def at_step(step: int):
    return lambda trainer, *_, **__: trainer.state.global_step + 1 == step


def delete_one_file(folder, **_) -> None:
    next(path for path in Path(folder).rglob("*") if path.is_file()).unlink()
    die()


def limit_file_size(size: int):
    return lambda *_, **__: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def arrange(moment: str) -> None:
    name, _, number = moment.partition(" ")
    step = int(number or 0)
    if name == "training":
        around(Trainer, "training_step", at_step(step), die)
    elif name == "weights":
        written = in_checkpoint(step, "model.safetensors")
        around(safetensors.torch, "serialize_file", written, after=lambda _, path, *__, **___: cut(path))
    elif name == "model":  # of the end, not of a checkpoint
        written = lambda _, path, *__, **___: str(path).endswith("model.safetensors") and "checkpoint-" not in str(path)  # noqa: E731
        around(safetensors.torch, "serialize_file", written, after=lambda _, path, *__, **___: cut(path))
    elif name == "optimizer":
        around(torch, "save", in_checkpoint(step, "optimizer.pt"), die)
    elif name == "state":
        around(TrainerState, "save_to_json", in_checkpoint(step, "trainer_state.json"), after=lambda _, path: cut(path))
    elif name in ("rename", "renamed"):
        when = lambda _, to, **__: str(to) == f"out/checkpoint-{step}"  # noqa: E731
        around(os, "rename", when, **{"before" if name == "rename" else "after": die})
    elif name == "rotation":
        around(shutil, "rmtree", lambda *_, **__: any(Path("out/_partial").glob(f"checkpoint-{step}")), delete_one_file)
    elif name == "reference":
        written = lambda _, path, *__, **___: str(path).endswith(".partial")  # noqa: E731
        around(safetensors.torch, "serialize_file", written, after=lambda _, path, *__, **___: cut(path))
    elif name == "metrics":
        around(os, "replace", lambda _, to: str(to).endswith("metrics.jsonl"), die)
    elif name == "full-after":  # weights fit into files of this size, or not even they
        around(Trainer, "training_step", at_step(3), limit_file_size(step))
    elif name == "full-cache":
        written = lambda _, path, *__, **___: str(path).endswith(".partial")  # noqa: E731
        unlimited = limit_file_size(resource.RLIM_INFINITY)
        around(safetensors.torch, "serialize_file", written, limit_file_size(100), unlimited)
    elif name == "full-disk":
        mount("out", step)
    elif name:
        raise ValueError(moment)


def mount(folder: str, size: int) -> None:
    """A disk of this size there, for this process: a tmpfs in a namespace of its own. Exit code 77 if not allowed."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    os.makedirs(folder, exist_ok=True)
    try:
        if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        if libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode()):
            raise OSError(ctypes.get_errno(), "mount")
    except OSError as error:
        print(f"no disk of my own: {error}", file=sys.stderr)
        os._exit(77)


def child(job: dict, rank: int) -> None:
    os.chdir(Path(job["folder"]) / (f"disk-{rank}" if job["own_disks"] else ""))
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if job["ranks"] > 1:
        local = 0 if job["own_disks"] else rank  # each on a machine of its own
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(job["ranks"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    code = 1
    try:
        if rank == 0:
            arrange(job["moment"])
        main(job["argv"])
        code = 0
    except SystemExit as exit:
        code = int(exit.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        if job["moment"].startswith("full-disk"):  # it goes with this process
            shutil.copytree("out", "out-copy")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        processes = {}
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                child(job, rank)
            processes[pid] = rank
        codes = [0] * job["ranks"]
        while processes:
            pid, status = os.wait()
            rank = processes.pop(pid)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank] and processes:  # as a launcher does
                time.sleep(1)
                for other in processes:
                    os.kill(other, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    serve()
