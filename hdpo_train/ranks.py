"""Several processes: every pair counts once, and engines that shard the model leave the numbers of the loss alone.

Processes take the same number of batches of the same size, or they would wait for each other for ever: accelerate fills
the last ones up with pairs from the beginning. Here those are left out again, and every batch weighs what it holds.

Where sequences are split (`sp_size`), the processes of a group have the same batch, and accelerate does not know: to it
and its engines they are ranks of data like others. All of them average gradients over all W processes, while a group's
gradient is the sum over its own,

    ∂L/∂θ = (s / W) Σ_groups Σ_(ranks of the group) g_rank = (1 / W) Σ_ranks s · g_rank        s = sp_size

so each rank's gradient is s times its own part; the loss stays what it is.
"""

import contextlib
import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, ParallelismConfig
from accelerate.data_loader import DataLoader
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from hdpo_train.model.sequence_ranks import SequenceRanks

T = TypeVar("T")
Arguments = TypeVar("Arguments", bound=TrainingArguments)


def as_parallelism_config(given: Any) -> ParallelismConfig | None:
    """From a mapping, or one in JSON. Raises ValueError for what is none, and for unknown keys."""
    if given is None or isinstance(given, ParallelismConfig):
        return given
    try:
        return ParallelismConfig(**(json.loads(given) if isinstance(given, str) else given))
    except (TypeError, ValueError) as error:
        raise ValueError(f'parallelism_config is {given!r}, not like {{"sp_size": 2}}: {error}') from error


def without_sequence_ranks(args: Arguments) -> tuple[Arguments, int]:
    """Options as accelerate is to see them, and sp_size; both by parallelism_config or accelerate's config file.

    Raises ValueError for other ways to split a model or its sequences.
    """
    config: Any = args.parallelism_config
    if config is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        config = ParallelismConfig()  # whose sizes accelerate launch has put into the environment
    if config is None:
        return args, 1
    if config.cp_size > 1:
        raise ValueError(
            f"parallelism_config with cp_size={config.cp_size}: ring attention cannot keep packed sequences apart; "
            f"sp_size={config.cp_size} splits them as well"
        )
    if config.tp_size > 1:
        raise ValueError(
            f"parallelism_config with tp_size={config.tp_size}: the LM head must be whole on a device; FSDP2 or ZeRO-3 "
            "shard it between steps, and sp_size splits the memory that a long sequence takes"
        )
    processes = args.world_size
    if processes % config.sp_size:
        raise ValueError(
            f"sp_size={config.sp_size} does not divide the processes of this run ({processes}): start it by accelerate "
            "launch or torchrun on a multiple of sp_size"
        )
    if config.sp_size > 1:
        args = copy.copy(args)
        replicas = config.dp_replicate_size if config.dp_shard_size > 1 else 1
        sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        args.parallelism_config = ParallelismConfig(
            dp_replicate_size=replicas, dp_shard_size=processes // replicas if sharded else 1,
            tp_size=1, cp_size=1, sp_size=1,
        )  # fmt: skip
    return args, config.sp_size


def sequence_ranks(size: int) -> SequenceRanks | None:
    """This process's group of so many, which share every row; to be called by all processes."""
    return SequenceRanks(dist.new_subgroups(size)[0]) if size > 1 else None


class DataRanks:
    """An accelerator that deals batches to groups of processes: those of a group get the same ones."""

    def __init__(self, accelerator: Accelerator, size: int) -> None:
        self._accelerator, self._size = accelerator, size
        self.num_processes = accelerator.num_processes // size
        self.process_index = accelerator.process_index // size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def _prepare_device_mesh(self) -> None:  # from which accelerate would deal to all of them
        return None

    def prepare_data_loader(self, loader: DataLoader, *args: Any, **kwargs: Any) -> DataLoader:
        return Accelerator.prepare_data_loader(self, loader, *args, **kwargs)  # type: ignore[arg-type]

    def gather(self, tensor: Tensor) -> Tensor:
        """One group's after the other's, along the first dimension."""
        return self._accelerator.gather(tensor).unflatten(0, (-1, len(tensor)))[:: self._size].flatten(0, 1)

    def gather_for_metrics(self, tensor: Tensor) -> Tensor:
        return Accelerator.gather_for_metrics(self, tensor)  # type: ignore[arg-type]


def data_ranks(accelerator: Accelerator, ranks: SequenceRanks | None) -> Any:
    """An accelerator that knows the processes as ranks of data; from now on all loaders are dealt out so."""
    if ranks is None:
        return accelerator
    dealing = DataRanks(accelerator, ranks.size)
    accelerator.prepare_data_loader = dealing.prepare_data_loader  # type: ignore[method-assign] # Trainer's too
    return dealing


def check_dataloading(config: AcceleratorConfig, processes: int) -> None:
    """Raises ValueError for options of accelerator_config under which ranks would hang or pairs be torn apart."""
    if config.split_batches:
        raise ValueError(
            "accelerator_config split_batches=True shares per_device_train_batch_size out among the ranks; leave it "
            "out: that is the pairs of each rank"
        )
    if processes > 1 and not config.even_batches:
        raise ValueError(
            "accelerator_config even_batches=False gives ranks different numbers of batches, so that they wait for "
            "each other for ever; leave it out: pairs that fill up the last batches are not counted"
        )
    if config.dispatch_batches:
        raise ValueError(
            "accelerator_config dispatch_batches=True cuts one batch into the ranks' shares, which packed pairs do not "
            "allow; leave it out: every rank reads its own"
        )


def own_pairs(pairs: int, accelerator: Accelerator) -> int:
    """How many of a batch's pairs are not duplicates that fill it up. A rank may have none, and must still take part.

    To be called before the next batch is asked for.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader:
        return pairs
    # The last batches of all ranks, one after the other, are the pairs that remained and then those that fill up.
    remained = len(state.active_dataloader.dataset) % (pairs * accelerator.num_processes)
    return min(max(remained - accelerator.process_index * pairs, 0), pairs) if remained else pairs


def weights(pairs: list[int], accelerator: Accelerator) -> list[Any]:
    """The factors on the losses of a step's micro-batches, means over so many pairs, that make the mean over
    micro-batches and ranks the mean over all pairs."""
    total: Any = sum(pairs)
    if accelerator.num_processes > 1:
        total = accelerator.reduce(torch.tensor(float(total), device=accelerator.device), "sum")
    return [own * len(pairs) * accelerator.num_processes / total for own in pairs]


class OwnRandomNumbers(TrainerCallback):
    """Every rank draws random numbers of its own: errors of the sampled gradient that are alike would not average out.

    From the start of training on, when the samplers have been made, and before a checkpoint brings its ranks' states.
    """

    def __init__(self, accelerator: Accelerator, seed: int) -> None:
        self.seed = seed + accelerator.process_index
        config = accelerator.dataloader_config
        if config.data_seed is None:  # pairs are shuffled by torch's seed then, which ranks would have to share
            config.data_seed = seed

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        torch.manual_seed(self.seed)


def keep_output_dtype(accelerator: Accelerator) -> None:
    """Loss and log-probs leave the model in fp32: accelerate has FSDP2 round every output to the parameters' dtype."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def together(action: Callable[[], T]) -> T:
    """action on this rank; if it fails on any rank, all raise, so that none waits for one that is gone."""
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    messages = gather_object([None if failure is None else f"{failure}"])
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise ValueError(f"rank {rank}: {message}")
    return result


def shards(accelerator: Accelerator) -> bool:
    """Whether an engine takes the model to device, dtype and shards when training begins: FSDP2 or DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED or bool(getattr(accelerator, "is_fsdp2", False))


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Every rank has the whole weights of a model that was loaded in shards (ZeRO-3's zero.Init)."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


@contextlib.contextmanager
def as_in_training(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """The model whole, on the device and in training's precision: rounded weights, or autocast."""
    if len(getattr(model, "hf_device_map", ())) > 1:  # spread over devices by its own hooks
        with accelerator.autocast():
            yield
        return
    dtype = (
        {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        if shards(accelerator)
        else None
    )
    tensors = [*model.parameters(), *model.buffers()]
    kept = [tensor.data for tensor in tensors]
    for tensor in tensors:
        cast = dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        tensor.data = tensor.data.to(accelerator.device, dtype if cast else tensor.dtype)
    try:
        with contextlib.nullcontext() if shards(accelerator) else accelerator.autocast():
            yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data
