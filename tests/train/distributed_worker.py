"""Run by test_distributed.py with gloo processes: python distributed_worker.py FOLDER MODE …, or zero3 OPTION …"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, TrainerCallback

from hdpo_train import HDPOConfig, HDPOTrainer
from hdpo_train.cli.main import main
from hdpo_train.data.tokenize import PairCollator, tokenize_pairs
from hdpo_train.model import tiles
from hdpo_train.model.head import attach_loss, bare, model_inputs
from tests.train.tiny import make_model, make_records

PAIRS_PER_STEP = 8
REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}  # the one that DDP can stumble over
# name: pairs to train on, gradient accumulation of the ranks (one process: none), options
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "even": (16, 1, {"num_train_epochs": 2}),
    "odd last batch": (13, 1, {"num_train_epochs": 2, "eval_strategy": "epoch"}),  # 8 ranks' pairs, then 5
    "a rank without pairs": (13, 2, {"num_train_epochs": 2, "eval_strategy": "epoch"}),  # 4 + 4, 4 + 1
    "fewer pairs than ranks": (3, 1, {"num_train_epochs": 2}),
    "drop_last": (13, 1, {"num_train_epochs": 1, "dataloader_drop_last": True}),
    "adapter": (16, 1, {"num_train_epochs": 2}),
    "tiles": (16, 1, {"num_train_epochs": 1, "tiled_layers": True, "gradient_checkpointing": True, **REENTRANT}),
    "sampled": (16, 1, {"num_train_epochs": 2, "gradient": "sampled", "epsilon": 2**-4}),
    "target_entropy": (16, 1, {"num_train_epochs": 2, "target_entropy": "0.9", "entropy_prompts": 6}),
}
RANDOM = ("sampled", "target_entropy")  # ranks draw numbers of their own, so that one process takes other steps


class Parameters(TrainerCallback):
    """The parameters after every step; raises if they differ between ranks. And what the first step would draw."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.drawn: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            self.drawn = self.drawn or torch.rand(4).tolist()

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        assert model is not None
        mine = flat_parameters(model)
        if dist.is_initialized():
            all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(all_ranks, mine)
            for rank, theirs in enumerate(all_ranks):
                assert torch.equal(mine, theirs), f"step {state.global_step}: rank {rank} has other parameters"
        self.steps.append(mine)


def flat_parameters(model: nn.Module) -> torch.Tensor:
    whole = (p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters())
    return torch.cat([p.flatten() for p in whole])


def make_trainer(folder: Path, case: str, ranks: int, seed: int = 0, **options: Any) -> HDPOTrainer:
    """A trainer for the case on so many ranks."""
    pairs, accumulate, case_options = CASES[case]
    accumulate = accumulate if ranks > 1 else 1
    args = HDPOConfig(
        output_dir=str(folder / case / "out"), ref_cache_dir=str(folder / case / "reference"), use_cpu=True, alpha=0.9,
        per_device_train_batch_size=PAIRS_PER_STEP // ranks // accumulate, gradient_accumulation_steps=accumulate,
        per_device_eval_batch_size=2 if ranks > 1 else 7, learning_rate=1e-3, logging_steps=1, save_strategy="no",
        disable_tqdm=True, lr_scheduler_type="constant", report_to="none", **{**case_options, **options},
    )  # fmt: skip
    return HDPOTrainer(
        make_model(seed=seed), args=args, callbacks=[Parameters()],
        train_dataset=Dataset.from_list(make_records(pairs)), eval_dataset=Dataset.from_list(make_records(7, seed=1)),
        processing_class=AutoTokenizer.from_pretrained(folder.parent / "tokenizer"),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if case == "adapter" else None,
    )  # fmt: skip


def train(folder: Path, case: str, ranks: int, **options: Any) -> tuple[HDPOTrainer, torch.Tensor]:
    """A run of the case on so many ranks, and (step, parameter) after every step."""
    trainer = make_trainer(folder, case, ranks, **options)
    trainer.train()
    (parameters,) = (call for call in trainer.callback_handler.callbacks if isinstance(call, Parameters))
    return trainer, torch.stack(parameters.steps)


def ddp(folder: Path) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    for case in CASES:
        trainer, steps = train(folder, case, ranks)
        if dist.get_rank() == 0:
            torch.save((steps, reference(trainer)), folder / case / "result.pt")
        if case == "sampled":
            check_random_numbers(trainer)
    refused: dict[str, dict[str, Any]] = {
        "different reference models": {"seed": dist.get_rank()},
        "even_batches": {"accelerator_config": {"even_batches": False}},
        "dispatch_batches": {"accelerator_config": {"dispatch_batches": True}},
    }
    for words, options in refused.items():
        try:
            make_trainer(folder, "even", ranks, **options)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"not refused: {options}")


def check_random_numbers(trainer: HDPOTrainer) -> None:
    """Ranks draw different ones, and still agree on the order of the pairs if they train again."""
    epoch = [row["prompt_ids"] for batch in trainer.get_train_dataloader() for row in batch["examples"].rows]
    (parameters,) = (call for call in trainer.callback_handler.callbacks if isinstance(call, Parameters))
    drawn, epochs = ([None] * dist.get_world_size() for _ in range(2))
    dist.all_gather_object(drawn, parameters.drawn)
    dist.all_gather_object(epochs, epoch)
    assert len({number for numbers in drawn for number in numbers}) == 4 * len(drawn), drawn
    pairs = [tuple(prompt_ids) for rank in epochs for prompt_ids in rank]
    assert len(set(pairs)) == len(pairs) == len(trainer.train_dataset), "ranks have the same pairs"


def reference(trainer: HDPOTrainer) -> torch.Tensor:
    """(pair, side) log-probs of training and evaluation set"""
    columns = ["ref_chosen_logp", "ref_rejected_logp"]
    sets = (trainer.train_dataset, trainer.eval_dataset)
    return torch.cat([torch.stack([torch.tensor(s[column][:]) for column in columns], 1) for s in sets])


def allow_fsdp_on_cpu() -> None:
    """accelerate shards on GPUs only, and would quietly take DDP on a CPU; but for that one test, it is its code."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type != DistributedType.FSDP:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def fsdp(folder: Path) -> None:
    """The trainer under accelerate's FSDP2 with the options of the shipped config: in fp32, in bf16, an adapter."""
    allow_fsdp_on_cpu()
    options = yaml.safe_load((Path(__file__).parents[2] / "configs" / "fsdp2.yaml").read_text())["fsdp_config"]
    os.environ.update({key.upper(): str(value) for key, value in options.items()}, ACCELERATE_USE_FSDP="true")
    ranks = int(os.environ["WORLD_SIZE"])
    runs = (
        ("odd last batch", "fp32", {}),
        ("even", "bf16", {"bf16": True}),
        ("adapter", "adapter", {}),
        ("tiles", "tiles", {}),
    )
    for case, name, options in runs:
        AcceleratorState._reset_state()
        trainer, steps = train(folder, case, ranks, **options)
        assert trainer.layout.packed and trainer.layout.share
        assert isinstance(trainer.model, FSDPModule) and isinstance(bare(trainer.model).model.layers[0], FSDPModule)
        trainer.save_model(str(folder / name))
        if dist.get_rank() == 0:
            torch.save((steps, reference(trainer)), folder / f"{name}.pt")
    AcceleratorState._reset_state()
    compare_sharded(folder, {})
    compare_sharded(folder, {"gradient": "sampled", "epsilon": 2**-4})


def compare_sharded(folder: Path, options: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "tokenizer")
    examples = tokenize_pairs(Dataset.from_list(make_records(4)), tokenizer)
    batch = PairCollator(1)(list(examples))
    batch["ref_logps"] = -10 - torch.arange(8.0)
    whole, sharded = make_model(), make_model()
    for model in (whole, sharded):
        attach_loss(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = []
    for model in (whole, sharded):
        torch.manual_seed(0)
        result = model(**model_inputs(batch, torch.device("cpu"), {"alpha": 0.9, "beta": 0.5, **options}))
        result.loss.backward()
        losses.append(result.loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    for (name, expected), parameter in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert isinstance(parameter.grad, DTensor), name
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, msg=f"gradient of {name}")


def zero3(*arguments: str) -> None:
    """The command line under DeepSpeed, which accelerate has on GPUs only; but for the backend, it is its code."""
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    main(list(arguments))


if __name__ == "__main__":
    if sys.argv[1] == "zero3":
        zero3(*sys.argv[2:])  # which ends its group itself
    else:
        tiles.TILE = 20  # so that sequences are in tiles here, and whole in the one process that is compared
        for mode in sys.argv[2:]:
            {"ddp": ddp, "fsdp": fsdp}[mode](Path(sys.argv[1]) / mode)
        dist.barrier()
    sys.stdout.flush()
    # The caches of FSDP's meshes keep groups alive, and a thread of gloo that meets the end of Python takes the process
    # down (SIGABRT).
    os._exit(0)
