"""Run by test_distributed.py under torchrun, two gloo processes: python distributed_worker.py ddp|fsdp FOLDER"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from hdpo_train import HDPOConfig, HDPOTrainer
from hdpo_train.data import PairCollator, tokenize_pairs
from hdpo_train.head import attach_loss
from hdpo_train.reference import model_inputs
from tests.train.tiny import make_model, make_records


def ddp(folder: Path) -> None:
    """Two ranks × 2 pairs: the trainer, and after it every parameter equal across ranks."""
    args = HDPOConfig(
        output_dir=str(folder / "out"), ref_cache_dir=str(folder / "reference"), use_cpu=True, max_steps=3, alpha=0.9,
        per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, save_strategy="no", disable_tqdm=True,
        lr_scheduler_type="constant", train_sampling_strategy="sequential",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    trainer = HDPOTrainer(
        make_model(), args=args, train_dataset=Dataset.from_list(make_records()), processing_class=tokenizer
    )
    trainer.train()
    mine = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, mine)
    assert torch.equal(*all_ranks), "parameters differ between ranks"
    if dist.get_rank() == 0:
        torch.save(mine, folder / "ddp.pt")


def fsdp(folder: Path) -> None:
    """Sharded by fully_shard (layers and root): loss and gradients of the unsharded model."""
    dist.init_process_group("gloo")
    compare_sharded(folder, {})
    compare_sharded(folder, {"gradient": "sampled", "epsilon": 2**-4})


def compare_sharded(folder: Path, options: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    examples = tokenize_pairs(Dataset.from_list(make_records(4)), tokenizer)
    batch = PairCollator(1)(list(examples))
    batch["ref_logps"] = -10 - torch.arange(8.0)
    whole, sharded = make_model(), make_model()
    for model in (whole, sharded):
        attach_loss(model, {"alpha": 0.9, "beta": 0.5, **options})
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = []
    for model in (whole, sharded):
        torch.manual_seed(0)
        result = model(**model_inputs(batch, torch.device("cpu")))
        result.loss.backward()
        losses.append(result.loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    for (name, expected), parameter in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert isinstance(parameter.grad, DTensor), name
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, msg=f"gradient of {name}")


if __name__ == "__main__":
    {"ddp": ddp, "fsdp": fsdp}[sys.argv[1]](Path(sys.argv[2]))
    dist.destroy_process_group()
