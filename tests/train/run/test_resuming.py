"""Runs that go on: what has changed since, what does not fit, an end that stays one, and SIGTERM."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from hdpo_train import HDPOConfig, HDPOTrainer
from hdpo_train.run.lock import LOCK_FILE
from hdpo_train.run.report import METRICS_FILE, read_metrics
from hdpo_train.run.run_record import RUN_FILE
from tests.train.tiny import make_model, make_records

OPTIONS = dict(
    use_cpu=True, seed=0, per_device_train_batch_size=4, max_steps=5, save_steps=2, logging_steps=1, alpha=0.9,
    learning_rate=1e-3, disable_tqdm=True, lr_scheduler_type="constant", report_to="none",
)  # fmt: skip


def make_trainer(folder: Path, tokenizer, records=None, **options) -> HDPOTrainer:
    args = HDPOConfig(output_dir=str(folder / "out"), ref_cache_dir=str(folder / "reference"), **{**OPTIONS, **options})
    return HDPOTrainer(
        make_model(), args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(records or make_records())
    )


@pytest.fixture(scope="module")
def ended(tokenizer, tmp_path_factory):
    """A run of five steps, three an epoch, that has ended with checkpoints of steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("ended")
    trainer = make_trainer(folder, tokenizer)
    trainer.train()
    assert (folder / "out" / LOCK_FILE).exists()
    trainer.save_model()
    return folder


@pytest.fixture
def copy(ended, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(ended, tmp_path / "copy"))


@pytest.fixture
def warnings(caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("transformers").removeHandler(caplog.handler)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "out").iterdir() if p.is_file() and p.name != "training_args.bin"}


@pytest.mark.parametrize("lost", ["", "model.safetensors", "checkpoint-*"])
def test_train_of_an_ended_run_leaves_it_bit_for_bit(lost, ended, copy, tokenizer, warnings):
    """Also one that was killed while it saved its model, and one that has no checkpoint of its last step."""
    for path in (copy / "out").glob(lost) if lost else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    trainer = make_trainer(copy, tokenizer)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5
    trainer.save_model()
    assert contents(copy) == contents(ended)
    assert ("it has ended at step 5: nothing to do" in warnings.text) == (lost != "model.safetensors")
    assert not (copy / "out" / LOCK_FILE).exists()


def test_train_from_the_last_checkpoint_of_an_ended_run_takes_no_step(ended, copy, tokenizer):
    trainer = make_trainer(copy, tokenizer)
    trainer.train(resume_from_checkpoint=str(copy / "out" / "checkpoint-5"))
    trainer.save_model()
    assert contents(copy) == contents(ended)


def test_train_goes_on_where_max_steps_was_raised(copy, tokenizer, warnings):
    trainer = make_trainer(copy, tokenizer, max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert [line["step"] for line in read_metrics(copy / "out") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert "checkpoint-5 was written with other options; from here on: max_steps 5 → 6\n" in warnings.text


def test_train_says_once_what_has_changed_and_takes_the_new_options(copy, tokenizer, warnings):
    changed = {"alpha": 1.1, "learning_rate": 5e-4, "weight_decay": 0.1, "logging_steps": 2, "max_steps": 6}
    trainer = make_trainer(copy, tokenizer, make_records(8, seed=1), alpha_level="token", **changed)
    trainer.train(resume_from_checkpoint=str(copy / "out" / "checkpoint-4"))
    (line,) = (line for line in warnings.text.splitlines() if "was written with other options" in line)
    for words in ("alpha 0.9 → 1.1", "learning_rate 0.001 → 0.0005", "weight_decay 0.0 → 0.1", "max_steps 5 → 6"):
        assert words in line
    assert "train data set 12 pairs, " in line and " → 8 pairs, " in line and "alpha_level sequence → token" in line
    assert line.count("→") == 6  # neither model nor tokenizer, nor how often it is logged
    last = [line for line in read_metrics(copy / "out") if "loss" in line][-1]
    assert (last["learning_rate"], last["alpha"]) == (5e-4, 1.1)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.1, 0.0}


def test_train_names_a_base_model_and_a_tokenizer_that_have_changed(copy, tokenizer, warnings):
    trainer = make_trainer(copy, tokenizer, max_steps=6)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] += 1e-3
    trainer.processing_class.chat_template = "{{ messages }}"
    trainer.train(resume_from_checkpoint=True)
    trainer.processing_class.chat_template = None
    (line,) = (line for line in warnings.text.splitlines() if "was written with other options" in line)
    assert "; model " in line and "; chat template " in line and line.count("→") == 3


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_train_refuses_a_checkpoint_of_another_optimizer(optim, copy, tokenizer):
    trainer = make_trainer(copy, tokenizer, optim=optim, max_steps=6)
    with pytest.raises(ValueError, match=rf"checkpoint-5: its optimizer is adamw_torch.*does not fit --optim {optim}"):
        trainer.train(resume_from_checkpoint=True)


def test_device_of_a_rank_on_a_cpu_has_no_number(tmp_path, monkeypatch):
    """transformers 5.17 loads a checkpoint's optimizer to it, and torch knows no cpu:0."""
    args = HDPOConfig(output_dir=str(tmp_path), **OPTIONS)
    for device, expected in (("cpu:0", "cpu"), ("cuda:1", "cuda:1")):
        monkeypatch.setattr(TrainingArguments, "device", torch.device(device))
        assert args.device == torch.device(expected)


def test_train_refuses_a_checkpoint_that_is_broken_and_names_the_last_good_one(copy, tokenizer):
    for step in (4, 5):
        path = copy / "out" / f"checkpoint-{step}" / "model.safetensors"
        weights = load_file(path)
        weights["model.norm.weight"][3] = float("nan")
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match=r"checkpoint-5 is broken.*_checkpoint \S*/out/checkpoint-2$"):
        make_trainer(copy, tokenizer, max_steps=6).train(resume_from_checkpoint=True)


def test_train_explains_state_that_cannot_be_loaded(copy, tokenizer):
    torch.save({"nonsense": 1}, copy / "out" / "checkpoint-5" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"cannot resume from \S*checkpoint-5: optimizer.pt or scheduler.pt cannot be"):
        make_trainer(copy, tokenizer, max_steps=6).train(resume_from_checkpoint=True)
    assert not (copy / "out" / LOCK_FILE).exists()


def test_train_does_not_mix_a_third_run_with_a_checkpoint_of_another(copy, ended, tokenizer):
    before = contents(copy)
    with pytest.raises(FileExistsError, match="holds another run"):
        make_trainer(copy, tokenizer).train(resume_from_checkpoint=str(ended / "out" / "checkpoint-4"))
    assert contents(copy) == before


def test_train_with_save_only_model_cannot_resume_and_says_so(tokenizer, tmp_path):
    options = {"save_only_model": True, "max_steps": 1, "save_steps": 1}
    make_trainer(tmp_path, tokenizer, **options).train()
    with pytest.raises(ValueError, match="save_only_model leaves checkpoints that cannot be resumed from"):
        make_trainer(tmp_path, tokenizer, **options).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"checkpoint-1: it was saved with save_only_model, so that it can be loaded"):
        make_trainer(tmp_path, tokenizer).train(resume_from_checkpoint=True)


def test_train_stops_at_sigterm_and_goes_on_with_the_same_lines(tokenizer, tmp_path, monkeypatch, warnings):
    """Between two log lines, and two checkpoints."""
    options = {"enable_jit_checkpoint": True, "logging_steps": 3, "save_strategy": "no", "gradient": "sampled"}
    options |= {"epsilon": 2**-7, "max_steps": 6}
    make_trainer(tmp_path / "whole", tokenizer, **options).train()
    step, before = HDPOTrainer.training_step, signal.getsignal(signal.SIGTERM)

    def training_step(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(HDPOTrainer, "training_step", training_step)
    with pytest.raises(SystemExit) as stop:
        make_trainer(tmp_path / "stopped", tokenizer, **options).train()
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert "SIGTERM: stopped at step 4 of 6" in warnings.text
    monkeypatch.setattr(HDPOTrainer, "training_step", step)
    make_trainer(tmp_path / "stopped", tokenizer, **options).train(resume_from_checkpoint=True)
    lines = [
        [{k: v for k, v in line.items() if "_per_second" not in k and "runtime" not in k} for line in read_metrics(f)]
        for f in (tmp_path / "whole" / "out", tmp_path / "stopped" / "out")
    ]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [0, 3, 6, 6]


def test_init_refuses_the_folder_of_the_model_that_it_starts_from(tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    before = {path.name for path in (tmp_path / "out").iterdir()}
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for name in (tmp_path / "out", tmp_path / "link"):
        args = HDPOConfig(output_dir=str(tmp_path / "out"), overwrite_output_dir=True, **OPTIONS)
        with pytest.raises(ValueError, match="which this run starts from and would overwrite"):
            HDPOTrainer(str(name), args=args, train_dataset=Dataset.from_list(make_records()))
    assert {path.name for path in (tmp_path / "out").iterdir()} == before


def test_save_model_and_overwriting_leave_files_of_the_users(copy, tokenizer):
    mine = {"model_v1.safetensors": b"1", "model-notes.safetensors": b"2", "adapter_v0.safetensors": b"3"}
    for name, text in mine.items():
        (copy / "out" / name).write_bytes(text)
    trainer = make_trainer(copy, tokenizer, max_steps=1, overwrite_output_dir=True)
    trainer.train()
    trainer.save_model()
    assert mine.items() <= contents(copy).items()
    assert json.loads((copy / "out" / RUN_FILE).read_text())["ended"] == 1
    assert [line["step"] for line in read_metrics(copy / "out") if "loss" in line] == [1]
    assert not list((copy / "out").glob("checkpoint-[245]")) and (copy / "out" / METRICS_FILE).exists()
