"""Run by test_packing.py under torchrun, two gloo processes: an epoch of uneven micro-batches as one step."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from hdpo_train import HDPOConfig
from tests.train.model.test_packing import SGD, UNEVEN, one_step

folder = Path(sys.argv[1])
args = HDPOConfig(
    output_dir=str(folder / "two"), ref_cache_dir=str(folder / "reference"), use_cpu=True, save_strategy="no",
    disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant", **SGD, **UNEVEN,
)  # fmt: skip
_, way, trainer = one_step(AutoTokenizer.from_pretrained(folder / "tokenizer"), args)
sizes = trainer.get_train_dataloader().batch_sampler.batch_sampler.sizes
assert sum(sizes[0::2]) != sum(sizes[1::2]), "the ranks have as many pairs each, so that nothing is tested"
if dist.get_rank() == 0:
    torch.save(way, folder / "way.pt")
dist.barrier()
sys.stdout.flush()
os._exit(0)  # as in distributed_worker.py
