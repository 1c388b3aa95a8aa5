"""Eval, pairs and sweep on two processes leave what one leaves, also where one of the two is killed."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdpo_train.cli.main import main
from tests.train.commands import write
from tests.train.tiny import make_model, make_records

ROOT = Path(__file__).parents[2]
# Commands one after the other, each behind code of its own; each connects the processes anew.
_MAIN = """
import json, os, sys
from hdpo_train.cli.main import main
for port, code, argv in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    exec(code, {})
    main(argv)
"""
_DIES = """  # process 1, in its second batch
import os
from hdpo_train.evaluation.sampler import Sampler
draw = Sampler._draw
def dies(sampler, model, number, *rest):
    return os.kill(os.getpid(), 9) if number == 3 else draw(sampler, model, number, *rest)
Sampler._draw = dies
"""
_EACH_TRAINS = """  # a process waits for the other one before it trains
import os, time
from hdpo_train.sweep.run import _Job
train = _Job._train
def trains(job, *rest):
    (job.sweep / f"process-{os.getpid()}").touch()
    while len([*job.sweep.glob("process-*")]) < 2:
        time.sleep(0.1)
    train(job, *rest)
_Job._train = trains
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model, prompts and pairs, and in "one" what one process makes of them."""
    folder = tmp_path_factory.mktemp("processes")
    make_model(spread=20.0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write(folder / "prompts.jsonl", [{"prompt": f"{i}. Say sun:"} for i in range(3)])
    write(folder / "train.jsonl", make_records(8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for words in commands(folder, "one").values():
        main(words)
    torch.set_num_threads(threads)
    return folder


def commands(folder: Path, to: str) -> dict[str, list[str]]:
    judged = [
        "--model_name_or_path",
        folder / "model",
        "--prompts",
        folder / "prompts.jsonl",
        "--checker",
        "regex:[a-m]",
    ]
    drawn = [*judged, "--max_new_tokens", 4, "--num_samples", 5, "--batch_size", 4]
    training = ["--alpha", 0.7, "--seeds", 1, "--max_steps", 2, "--use_cpu", True, "--learning_rate", 1e-3]
    words = {
        "eval": [*drawn, "--output_dir", folder / to / "eval"],
        "pairs": [*drawn[:-2], "--stop", *"nopqrstu", "--output", folder / to / "pairs.jsonl"],
        "sweep": [*drawn, "--output_dir", folder / to / "sweep", "--dataset_name", folder / "train.jsonl", *training],
    }
    return {name: [name, *map(str, each)] for name, each in words.items()}


def assert_same(folder: Path, to: str, *names: str) -> None:
    for name in names:
        assert (folder / to / name).read_bytes() == (folder / "one" / name).read_bytes(), name
    assert not list((folder / to).rglob("_lock*"))


def run_two(*commands: list[str], codes: dict[str, str]) -> list[tuple[int, str]]:
    """Exit codes and output of two processes without a launcher, which would end one when the other dies.

    codes: command -> what both run before it.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in commands]
        for each in sockets:
            each.bind(("localhost", 0))
        ports = [str(each.getsockname()[1]) for each in sockets]
    work = [(port, codes.get(words[0], ""), words) for port, words in zip(ports, commands, strict=True)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _MAIN, json.dumps(work)],
            env={**environment, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        printed = [each.communicate(timeout=200)[0] for each in started]
    finally:
        for each in started:
            each.kill()
    return [(each.returncode, text) for each, text in zip(started, printed, strict=True)]


def test_eval_pairs_and_sweep_on_two_processes_leave_what_one_leaves(folder):
    whole = (folder / "one" / "eval" / "samples-model.jsonl").read_bytes()
    (folder / "two" / "eval").mkdir(parents=True)
    (folder / "two" / "eval" / "samples-model.jsonl").write_bytes(whole[: len(whole) // 2])  # they go on with these
    (first, printed), (second, other) = run_two(*commands(folder, "two").values(), codes={"sweep": _EACH_TRAINS})
    assert (first, second) == (0, 0), printed + other
    assert_same(folder, "two", "eval/samples-model.jsonl", "eval/results.json", "eval/results.md")
    assert_same(folder, "two", "pairs.jsonl", "pairs.samples.jsonl", "pairs.summary.json")
    assert_same(folder, "two", "sweep/results.json", "sweep/sweep.md", "sweep/alpha-0.7/seed-0/samples.jsonl")
    assert "Written:" in printed and "Written:" not in other and "Sampling" not in other


def test_eval_ends_when_a_process_dies_and_then_goes_on(folder):
    words = commands(folder, "dead")["eval"]
    (first, _), (second, _) = run_two(words, codes={"eval": _DIES})
    assert (first not in (0, None), second) == (True, -9)
    drawn = (folder / "dead" / "eval" / "samples-model.jsonl").read_bytes()
    assert drawn.count(b"\n") == 1 + 3 + 4  # header, and the first two batches
    assert not (folder / "dead" / "eval" / "results.json").exists()
    main(words)
    assert_same(folder, "dead", "eval/samples-model.jsonl", "eval/results.json")
