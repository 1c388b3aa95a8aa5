"""kill -9 at any moment, and a full disk: the run that is resumed has the metrics of one that nothing happened to."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hdpo_train.run.checkpoints import move_in
from hdpo_train.run.report import METRICS_FILE, read_metrics
from hdpo_train.run.run_record import RUN_FILE
from hdpo_train.run.whole import checkpoint_problem
from tests.train.tiny import make_model, make_records

ROOT = Path(__file__).parents[2]
TIMES = ("_runtime", "_per_second")  # ends of the keys that depend on time; all others are equal bit for bit
RESUME = ["--resume_from_checkpoint", "true"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def worker():
    """A process that has imported everything, and forks one for every run."""
    command = [sys.executable, str(ROOT / "tests" / "train" / "survive_worker.py")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with its tokenizer, and pairs: three steps an epoch."""
    from tests.train.conftest import tokenizer

    folder = tmp_path_factory.mktemp("survives")
    make_model().save_pretrained(folder / "model")
    tokenizer.__wrapped__().save_pretrained(folder / "model")
    lines = [json.dumps(record) + "\n" for record in make_records(12)]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def arguments(source: Path, **options) -> list[str]:
    values = {
        "model_name_or_path": source / "model", "dataset_name": source / "pairs.jsonl", "output_dir": "out",
        "ref_cache_dir": "reference", "use_cpu": True, "max_steps": 6, "save_steps": 2, "save_total_limit": 1,
        "logging_steps": 1, "per_device_train_batch_size": 4, "alpha": 0.9, "learning_rate": 1e-3, "disable_tqdm": True,
    }  # fmt: skip
    return [word for name, value in {**values, **options}.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(worker, source):
    """run(folder, moment, words, ranks, **options): exit codes and log of a run there that something happens to."""

    def run(folder: Path, moment: str = "", words=(), ranks: int = 1, own_disks: bool = False, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = folder / "log.txt"
        log.unlink(missing_ok=True)
        argv = [*arguments(source, **options), *words]
        job = {"folder": str(folder), "argv": argv, "moment": moment, "log": str(log), "ranks": ranks, "port": port}
        job["own_disks"] = own_disks
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.flush()
        codes = json.loads(worker.stdout.readline())
        return codes if ranks > 1 else codes[0], log.read_text()

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    code, log = run(folder)
    assert code == 0, log
    return folder / "out"


def timeless(output_dir: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in read_metrics(output_dir)]


def assert_same_run(found: Path, expected: Path) -> None:
    assert timeless(found) == timeless(expected)
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert {path.name for path in found.iterdir() if path.is_dir()} == {"checkpoint-6"}
    assert checkpoint_problem(found / "checkpoint-6") is None


def checkpoints(output_dir: Path) -> set[str]:
    return {path.name for path in output_dir.glob("checkpoint-*")}


@pytest.mark.parametrize(
    ("moment", "left", "words"),
    [
        ("reference", set(), "starting from the beginning"),
        ("weights 2", set(), "starting from the beginning"),
        ("training 6", {"checkpoint-4"}, ""),
        ("weights 4", {"checkpoint-2"}, "left by a run that was killed"),
        ("optimizer 4", {"checkpoint-2"}, "left by a run that was killed"),
        ("state 4", {"checkpoint-2"}, "left by a run that was killed"),
        ("rename 4", {"checkpoint-2"}, "left by a run that was killed"),
        ("renamed 4", {"checkpoint-2", "checkpoint-4"}, "left by a run that was killed"),
        ("rotation 2", {"checkpoint-4"}, "left by a run that was killed"),
    ],
)
def test_train_killed_and_resumed_equals_an_uninterrupted_run(moment, left, words, run, whole, tmp_path):
    code, log = run(tmp_path, moment)
    assert code == -signal.SIGKILL, log
    assert checkpoints(tmp_path / "out") == left
    assert all(checkpoint_problem(tmp_path / "out" / name) is None for name in left)
    code, log = run(tmp_path, words=RESUME)
    assert code == 0 and words in log, log
    assert_same_run(tmp_path / "out", whole)
    (cache,) = (tmp_path / "reference").iterdir()
    assert cache.suffix == ".safetensors"


def test_train_killed_again_while_it_resumes(run, whole, tmp_path):
    assert run(tmp_path, "training 4")[0] == -signal.SIGKILL
    with open(tmp_path / "out" / METRICS_FILE, "a") as file:
        file.write('{"step": 4, "lo')  # a line that the kill cut
    before = (tmp_path / "out" / METRICS_FILE).read_text()
    assert run(tmp_path, "metrics", RESUME)[0] == -signal.SIGKILL
    assert (tmp_path / "out" / METRICS_FILE).read_text() == before
    assert run(tmp_path, "rename 6", RESUME)[0] == -signal.SIGKILL
    code, log = run(tmp_path, words=RESUME)
    assert code == 0, log
    assert_same_run(tmp_path / "out", whole)


def test_train_killed_before_its_first_checkpoint_starts_again_with_the_same_command(run, whole, tmp_path):
    assert run(tmp_path, "training 2")[0] == -signal.SIGKILL
    code, log = run(tmp_path)
    assert code == 0 and "ended before its first checkpoint" in log, log
    assert_same_run(tmp_path / "out", whole)
    assert (tmp_path / "out" / f"{METRICS_FILE}.old").exists()


def test_train_killed_while_it_saves_its_model_leaves_the_one_before(run, whole, tmp_path):
    code, log = run(tmp_path, max_steps=4, lr_scheduler_type="constant")
    assert code == 0, log
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert run(tmp_path, "model", RESUME, lr_scheduler_type="constant")[0] == -signal.SIGKILL
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    code, log = run(tmp_path, words=RESUME, lr_scheduler_type="constant")
    assert code == 0, log
    last = (tmp_path / "out" / "checkpoint-6" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == last != before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in whole.iterdir()}


SHARDED, SINGLE = {"max_shard_size": "40KB"}, {}


@pytest.mark.parametrize(("old", "new"), [(SINGLE, SHARDED), (SHARDED, SINGLE), (SHARDED, SHARDED)], ids=str)
def test_move_in_never_leaves_a_mixture_of_two_models(old, new, tmp_path, monkeypatch):
    models = [make_model(seed=seed) for seed in (0, 1)]
    moved, moments = [], 0

    def replace(source, target):
        if len(moved) == moments:
            raise InterruptedError
        moved.append(target)
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    done = False
    while not done:
        folder = tmp_path / str(moments)
        models[0].save_pretrained(folder, **old)
        models[1].save_pretrained(folder / "_partial" / "model", **new)
        moved.clear()
        with contextlib.suppress(InterruptedError):
            move_in(folder / "_partial" / "model", folder)
            done = True
        try:
            found = AutoModelForCausalLM.from_pretrained(folder)
        except OSError as error:
            assert "no file named model.safetensors" in str(error) and not done
        else:
            whole = [all(map(torch.equal, found.parameters(), model.parameters())) for model in models]
            assert whole == ([False, True] if done else whole) and any(whole)
        moments += 1
    assert moments > 3 and not (folder / "_partial").exists()


def test_train_resumes_between_two_log_lines(run, tmp_path):
    """Means over the steps since the last line: a checkpoint has a line of its own."""
    options = {"logging_steps": 4, "save_steps": 3, "max_steps": 7}
    for name, moments in (("whole", [""]), ("killed", ["training 5", ""])):
        (tmp_path / name).mkdir()
        codes = [run(tmp_path / name, moment, RESUME, **options)[0] for moment in moments]
        assert codes[-1] == 0
    assert timeless(tmp_path / "killed" / "out") == timeless(tmp_path / "whole" / "out")
    assert [line["step"] for line in read_metrics(tmp_path / "whole" / "out") if "loss" in line] == [3, 4, 6, 7]


def test_train_names_the_best_checkpoint_by_where_it_stays(run, source, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 2}
    options["eval_dataset_name"] = source / "pairs.jsonl"
    assert run(tmp_path, "rename 6", **options)[0] == -signal.SIGKILL
    code, log = run(tmp_path, words=RESUME, **options)
    assert code == 0, log
    assert checkpoints(tmp_path / "out") == {"checkpoint-4", "checkpoint-6"}
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == f"out/checkpoint-{state['best_global_step']}"
    best = tmp_path / state["best_model_checkpoint"] / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == best.read_bytes()


def test_train_replaces_a_checkpoint_of_the_same_step(run, whole, tmp_path):
    """A run resumed before a later checkpoint writes that one again; killed between its two renames, it is there."""
    assert run(tmp_path, "training 5", save_total_limit=5)[0] == -signal.SIGKILL
    earlier = ["--resume_from_checkpoint", "out/checkpoint-2"]
    assert run(tmp_path, "rename 4", earlier, save_total_limit=5)[0] == -signal.SIGKILL
    assert checkpoints(tmp_path / "out") == {"checkpoint-2"}
    code, log = run(tmp_path, words=RESUME, save_total_limit=5)
    assert code == 0, log
    assert timeless(tmp_path / "out") == timeless(whole)
    assert checkpoints(tmp_path / "out") == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


SAMPLED = {  # two steps an epoch, resumed in the middle of the second
    "gradient": "sampled", "epsilon": 0.1, "max_tokens_per_batch": 25, "gradient_accumulation_steps": 2,
    "save_steps": 3,
}  # fmt: skip


SPLIT = {**SAMPLED, "parallelism_config": '{"sp_size": 2}'}


@pytest.mark.parametrize(
    ("moment", "options"),
    [("rename 4", {"per_device_train_batch_size": 2}), ("training 5", SAMPLED), ("training 5", SPLIT)],
    ids=["batches of their own", "sampled", "one sequence split"],
)
def test_train_of_two_ranks_survives(moment, options, run, tmp_path):
    options = {**options, "ref_cache_dir": tmp_path / "reference"}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    codes, log = run(tmp_path / "whole", ranks=2, **options)
    assert codes == [0, 0], log
    codes, log = run(tmp_path / "killed", moment, ranks=2, **options)
    assert codes[0] == -signal.SIGKILL and codes[1], log  # the other is killed, or finds the first one gone
    assert checkpoints(tmp_path / "killed" / "out") == {f"checkpoint-{options.get('save_steps', 2)}"}
    codes, log = run(tmp_path / "killed", words=RESUME, ranks=2, **options)
    assert codes == [0, 0], log
    assert_same_run(tmp_path / "killed" / "out", tmp_path / "whole" / "out")
    names = {path.name for path in (tmp_path / "killed" / "out" / "checkpoint-6").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= names


def test_train_of_two_ranks_with_a_disk_each_goes_on_from_what_both_have(run, tmp_path):
    """A rank that lacks a checkpoint would start from the beginning, and wait for the other for ever."""
    disks = [tmp_path / f"disk-{rank}" for rank in range(2)]
    for disk in disks:
        disk.mkdir()
    options = {"ranks": 2, "own_disks": True, "save_total_limit": 5, "max_steps": 3, "save_steps": 1}
    codes, log = run(tmp_path, **options)
    assert codes == [2, 2] and log.count("rank 1 does not see the folder out that checkpoints are saved to") == 2, log
    options["save_on_each_node"] = True
    codes, log = run(tmp_path, "training 3", **options)
    assert (
        codes[0] == -signal.SIGKILL
        and [checkpoints(disk / "out") for disk in disks] == [{"checkpoint-1", "checkpoint-2"}] * 2
    ), log
    (disks[1] / "out" / "checkpoint-2" / "rng_state_1.pth").unlink()
    codes, log = run(tmp_path, words=RESUME, **options)
    assert codes == [0, 0] and "checkpoint-2 of rank 1: rng_state_1.pth is missing. Going on from out/check" in log, log


def test_main_killed_from_outside_at_a_random_moment(source, whole, tmp_path):
    """The command itself, and a kill that it does not know of."""
    command = [sys.executable, "-m", "hdpo_train", *arguments(source), *RESUME]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log)
        while not checkpoints(tmp_path / "out") and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.parametrize("moment", ["full-disk 700000", "full-after 50000", "full-after 150000"])
def test_train_on_a_full_disk_says_so_and_keeps_the_checkpoint_before(moment, run, whole, tmp_path):
    """A tmpfs that is too small; and files that cannot grow, for the weights, and for the optimizer's state."""
    code, log = run(tmp_path, moment)
    if code == 77:
        pytest.skip(log)
    assert code == 2, log
    words = (
        "checkpoint-4 could not be written to out",
        "Free there: ",
        "the last checkpoint took ",
        "--save_total_limit",
    )
    for word in (*words, "out/checkpoint-2 is whole, --resume_from_checkpoint true goes on from it"):
        assert word in log
    if moment.startswith("full-disk"):
        shutil.rmtree(tmp_path / "out")
        shutil.move(tmp_path / "out-copy", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-2", METRICS_FILE, RUN_FILE}
    code, log = run(tmp_path, words=RESUME)
    assert code == 0, log
    assert_same_run(tmp_path / "out", whole)


def test_train_goes_on_without_a_cache_on_a_full_disk(run, whole, tmp_path):
    code, log = run(tmp_path, "full-cache")
    assert code == 0 and "could not be cached in reference" in log, log
    assert not list((tmp_path / "reference").iterdir())
    assert_same_run(tmp_path / "out", whole)
