"""Several processes follow one: DDP through the trainer, FSDP2, ZeRO-3, and the configs that are shipped for them."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hdpo_train.run.report import read_metrics
from tests.train.distributed_worker import CASES, RANDOM, flat_parameters, reference, train
from tests.train.tiny import make_model, make_records

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


def run_ranks(ranks: int, folder: Path, *modes: str) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run([*torchrun, str(ROOT / "tests" / "train" / "distributed_worker.py"), str(folder), *modes])


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request, tokenizer, tmp_path_factory):
    """All cases on so many ranks: by DDP, and by FSDP2 as configs/fsdp2.yaml has it.

    The worker itself asserts that ranks have equal parameters after every step, and FSDP2's gradients against the
    unsharded model.
    """
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer.save_pretrained(folder / "tokenizer")
    run_ranks(request.param, folder, "ddp", "fsdp")
    return folder


@pytest.fixture
def ddp(ranks):
    return ranks / "ddp"


@pytest.fixture
def fsdp(ranks):
    return ranks / "fsdp"


@pytest.fixture(scope="module")
def one(tokenizer, tmp_path_factory):
    """The oracle: the same cases in one process, each step one batch."""
    folder = tmp_path_factory.mktemp("one")
    tokenizer.save_pretrained(folder / "tokenizer")
    folder /= "one"
    results = {case: train(folder, case, ranks=1) for case in CASES}
    return folder, {case: (steps, reference(trainer)) for case, (trainer, steps) in results.items()}


def assert_same_metrics(several: Path, one: Path, relative: float) -> None:
    """Every metric of every line of both runs' metrics.jsonl, but times."""
    lines = list(zip(read_metrics(several / "out"), read_metrics(one / "out"), strict=True))
    assert len(lines) > 2
    for theirs, expected in lines:
        assert set(theirs) - {"total_flos"} == set(expected) - {"total_flos"}
        for key, value in expected.items():
            if isinstance(value, (int, float)) and not any(word in key for word in ("runtime", "per_second", "flos")):
                assert theirs[key] == pytest.approx(value, rel=relative, abs=1e-6), (expected["step"], key)


@pytest.mark.parametrize("case", [case for case in CASES if case not in RANDOM])
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
    for line, other in zip(lines[1:5], expected[1:5], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert line["num_tokens"] == other["num_tokens"]  # the same pairs in every step


def test_ddp_steers_all_ranks_alike(ddp, one):
    # That ranks have the same parameters after every step, and so the same α, is asserted by the worker.
    lines, expected = (read_metrics(folder / "target_entropy" / "out")[1:5] for folder in (ddp, one[0]))
    assert len({line["alpha"] for line in lines}) == 4
    for line, other in zip(lines, expected, strict=True):  # the same prompts, answered with other random numbers
        assert line["entropy/policy"] == pytest.approx(other["entropy/policy"], rel=0.05)


@pytest.mark.parametrize(("name", "case"), [("fp32", "odd last batch"), ("adapter", "adapter"), ("tiles", "tiles")])
def test_fsdp_takes_the_steps_of_one_process(name, case, fsdp, one):
    steps, logps = torch.load(fsdp / f"{name}.pt")
    folder, results = one
    expected, expected_logps = results[case]
    difference = (steps - expected).abs()
    print(f"fsdp, {name}: max {difference.max():.1e}, mean {difference.mean():.1e}")
    assert difference.max() < 1e-5 and difference.mean() < 1e-8
    torch.testing.assert_close(logps, expected_logps)
    assert_same_metrics(fsdp / case, folder / case, relative=1e-4)
    if name == "adapter":
        saved = PeftModel.from_pretrained(make_model(), fsdp / name)
    else:
        saved = AutoModelForCausalLM.from_pretrained(fsdp / name)
    torch.testing.assert_close(flat_parameters(saved), steps[-1])


def test_fsdp_in_bf16_starts_from_the_reference(fsdp):
    # The policy's weights are rounded to bf16 there, and so must be the reference's; but never the log-probs.
    line = read_metrics(fsdp / "even" / "out")[1]
    # Equal but for the rounding of attention, whose sums in bf16 depend on what else lies in a row (measured: 1e-3).
    # Log-probs rounded to bf16 would be off by one part in 256.
    assert line["rewards/margins"] == pytest.approx(line["rewards/initial_margins"], rel=2e-3)
    steps, logps = torch.load(fsdp / "bf16.pt")
    assert not torch.equal(logps, logps.bfloat16().float())


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "sp", "zero3"])
def test_shipped_configs_are_accelerate_configs(name):
    path = ROOT / "configs" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # raises for keys that it does not know
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "sp": "FSDP", "zero3": "DEEPSPEED"}
    assert config.distributed_type == expected[name]
    options = vars(launch_command_parser().parse_args(["script.py"]))
    for section in ("fsdp_config", "deepspeed_config", "parallelism_config"):
        assert set(getattr(config, section)) <= set(options), section
    assert f"accelerate launch --config_file configs/{name}.yaml -m hdpo_train" in path.read_text()


def test_accelerate_launch_with_the_ddp_config_leaves_a_model(tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in make_records(5)))
    out = tmp_path / "out"
    run([
        "-m", "accelerate.commands.launch", "--config_file", "configs/ddp.yaml", "--num_processes", "2",
        "-m", "hdpo_train", "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(out),
        "--dataset_name", str(tmp_path / "pairs.jsonl"), "--ref_cache_dir", str(tmp_path / "reference"),
        "--use_cpu", "True", "--per_device_train_batch_size", "1", "--num_train_epochs", "1", "--alpha", "0.9",
        "--learning_rate", "1e-3", "--logging_steps", "1",
    ])  # fmt: skip
    assert sum("loss" in line for line in read_metrics(out)) == 3  # 2 + 2 + 1 pairs
    saved = flat_parameters(AutoModelForCausalLM.from_pretrained(out))
    assert 0 < (saved - flat_parameters(make_model())).abs().max() < 0.01


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("split", [False, True], ids=["ranks of data", "one sequence split"])
def test_zero3_takes_the_steps_of_one_process(split, tokenizer, one, tmp_path):
    pairs = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2"]
    if split:
        pairs = ["--per_device_train_batch_size", "8", "--parallelism_config", '{"sp_size": 2}']
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, records in (("train", make_records(13)), ("eval", make_records(7, seed=1))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "out"
    worker = ROOT / "tests" / "train" / "distributed_worker.py"
    run([
        "-m", "accelerate.commands.launch", "--config_file", "configs/zero3.yaml", "--num_processes", "2", str(worker),
        "zero3", "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(out),
        "--dataset_name", str(tmp_path / "train.jsonl"), "--eval_dataset_name", str(tmp_path / "eval.jsonl"),
        "--ref_cache_dir", str(tmp_path / "reference"), "--alpha", "0.9", "--learning_rate", "1e-3",
        "--num_train_epochs", "2", "--eval_strategy", "epoch", "--logging_steps", "1",
        "--lr_scheduler_type", "constant", "--save_strategy", "no", *pairs,
    ], DS_ACCELERATOR="cpu")  # fmt: skip
    saved = flat_parameters(AutoModelForCausalLM.from_pretrained(out))
    folder, results = one
    difference = (saved - results["odd last batch"][0][-1]).abs()
    print(f"zero3: max {difference.max():.1e}, mean {difference.mean():.1e}")
    assert difference.max() < 1e-5 and difference.mean() < 1e-8
    assert_same_metrics(tmp_path, folder / "odd last batch", relative=1e-4)
