"""Several processes follow one: DDP through the trainer, FSDP2, ZeRO-3, and the configs that are shipped for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdpo_train.report import read_metrics
from tests.train.distributed_worker import CASES, reference, train

ROOT = Path(__file__).parents[2]


def run(command: list[str], timeout: int = 200, **environment: str) -> None:
    """python command, which must succeed in time; torchrun and accelerate end their processes when it does not."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        _, errors = process.communicate()
        pytest.fail(f"still running after {timeout} s: {errors[-4000:]}")
    assert process.returncode == 0, errors[-6000:]


def run_ranks(mode: str, ranks: int, folder: Path) -> Path:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run([*torchrun, str(ROOT / "tests" / "train" / "distributed_worker.py"), mode, str(folder)])
    return folder


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ddp(request, tokenizer, tmp_path_factory):
    """All cases on so many ranks; the worker itself asserts after every step that ranks have equal parameters."""
    folder = tmp_path_factory.mktemp("ddp")
    tokenizer.save_pretrained(folder / "tokenizer")
    return run_ranks("ddp", request.param, folder)


@pytest.fixture(scope="module")
def one(tokenizer, tmp_path_factory):
    """The oracle: the same cases in one process, each step one batch."""
    folder = tmp_path_factory.mktemp("one")
    tokenizer.save_pretrained(folder / "tokenizer")
    results = {case: train(folder, case, ranks=1) for case in CASES}
    return folder, {case: (steps, reference(trainer)) for case, (trainer, steps) in results.items()}


def assert_same_metrics(several: Path, one: Path, relative: float) -> None:
    """Every metric of every line of both runs' metrics.jsonl, but times."""
    lines = list(zip(read_metrics(several / "out"), read_metrics(one / "out"), strict=True))
    assert len(lines) > 2
    for theirs, expected in lines:
        assert set(theirs) == set(expected)
        for key, value in expected.items():
            if isinstance(value, (int, float)) and not any(word in key for word in ("runtime", "per_second", "flos")):
                assert theirs[key] == pytest.approx(value, rel=relative, abs=1e-6), (expected["step"], key)


@pytest.mark.parametrize("case", [case for case in CASES if case != "sampled"])
def test_ddp_takes_the_steps_of_one_process(case, ddp, one):
    steps, logps = torch.load(ddp / case / "result.pt")
    folder, results = one
    expected, expected_logps = results[case]
    difference = (steps - expected).abs()
    print(f"{case}: max {difference.max():.1e}, mean {difference.mean():.1e}")
    assert difference.max() < 1e-5 and difference.mean() < 1e-8  # updates are 1e-3 a step; measured: 1.2e-6, 2e-10
    torch.testing.assert_close(logps, expected_logps)
    assert_same_metrics(ddp / case, folder / case, relative=1e-4)


def test_ddp_with_the_sampled_gradient_keeps_ranks_equal(ddp, one):
    # One process draws other random numbers for its rows, so that it takes other steps; the first loss is exact.
    lines, expected = read_metrics(ddp / "sampled" / "out"), read_metrics(one[0] / "sampled" / "out")
    assert lines[1]["loss"] == pytest.approx(expected[1]["loss"], rel=1e-5)
    for line, other in zip(lines[2:5], expected[2:5], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.02)


def test_fsdp_gives_the_gradients_of_the_unsharded_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run_ranks("fsdp", 2, tmp_path)
