"""The loss under wrappers that must see it: DDP through the trainer, FSDP2's fully_shard around the model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from hdpo_train import HDPOTrainer
from hdpo_train.report import read_metrics
from tests.train.tiny import make_model, make_records

ROOT = Path(__file__).parents[2]


def run_two(mode: str, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(ROOT / "tests" / "train" / "distributed_worker.py"), mode, str(folder)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]


def test_ddp_follows_one_process_and_keeps_ranks_equal(tokenizer, config, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run_two("ddp", tmp_path)
    args = config(output_dir=str(tmp_path / "one"), max_steps=3, alpha=0.9, train_sampling_strategy="sequential")
    trainer = HDPOTrainer(
        make_model(), args=args, train_dataset=Dataset.from_list(make_records()), processing_class=tokenizer
    )
    trainer.train()
    for one, two in zip(read_metrics(tmp_path / "one")[1:4], read_metrics(tmp_path / "out")[1:4], strict=True):
        for key in ("loss", "rewards/margins", "entropy", "logps/chosen", "num_tokens"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
    one = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert (torch.load(tmp_path / "ddp.pt") - one).abs().max() < 5e-4


def test_fsdp_gives_the_gradients_of_the_unsharded_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run_two("fsdp", tmp_path)
