"""What a run will need, before it starts: memory of one process by kind, and time for a step.

Memory: an optimizer step is run without memory or computation (FakeTensorMode) on tensors of the real sizes, and a
tracker adds up what is alive. Time: the same model with one layer and with four is really run on the device; time is
linear in their number. Of the model only the config is read. Every sequence is taken to have max_length tokens.
"""

import copy
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, Trainer

from hdpo_kernels.gemm import UPCAST_BLOCK
from hdpo_kernels.lm_head import buffers_for
from hdpo_kernels.rows.torch import BLOCK_BYTES
from hdpo_train.checkpoints import readable
from hdpo_train.config import HDPOConfig
from hdpo_train.head import HeadTransform, PairBatch, attach_loss, bare, head_of

_KINDS = {"weights": "Parameter", "gradients": "Gradient", "optimizer": "Optstate", "activations": "Activation"}
_LAYERS = (1, 4)  # of the models that are timed
_SECONDS, _STEPS = 2.0, 5  # a model is timed for so long, and so often at least, after one step that is not
Build = Callable[[Any], nn.Module]  # from a config


class Plan(NamedTuple):
    """Of one process."""

    memory: dict[str, int]  # bytes alive when most are: weights, gradients, optimizer, activations, head, other
    seconds: float  # an optimizer step
    tokens: int  # in it


def make_plan(config: Any, args: HDPOConfig, build: Build | None = None) -> Plan:
    """config: the model's. build: what makes a model of it, default: AutoModelForCausalLM in fp32.

    Raises ValueError if max_length is None: the longest record would decide.
    """
    if args.max_length is None:
        raise ValueError("a plan needs --max_length: without it the longest record decides")
    build = build or AutoModelForCausalLM.from_config
    tokens = 2 * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.max_length
    return Plan(peak_memory(config, args, build), step_seconds(config, args, build), tokens)


def describe(plan: Plan, args: HDPOConfig) -> str:
    device, total = args.device.type, sum(plan.memory.values())
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
    lines = [f"One process on {device}, steps of {pairs} pairs of 2 × {args.max_length} tokens:", ""]
    lines += [f"  {name:12}{readable(size):>12}" for name, size in plan.memory.items()]
    lines += [f"  {'in all':12}{readable(total):>12} at the peak of a step"]
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        lines += [f"  {'free now':12}{readable(free):>12}" + ("" if total < free else ": it does not fit")]
    speed = plan.tokens / plan.seconds
    lines += ["", f"  {plan.seconds:.3g} s a step, {speed:,.0f} tokens/s; by models of few layers"]
    if device == "cpu":
        lines += [
            "",
            "Tensors alone: a process on a CPU takes some 100 MiB more for code and what its allocator keeps.",
        ]
    return "\n".join(lines)


def peak_memory(config: Any, args: HDPOConfig, build: Build) -> dict[str, int]:
    """Bytes of tensors alive at the peak of an optimizer step, by kind; head: what it adds to the peak."""
    without, sizes = (_tracked(config, args, build, with_workspace) for with_workspace in (False, True))
    memory = {name: without[kind] for name, kind in _KINDS.items()}
    memory["other"] = without["Total"] - sum(memory.values())
    memory["head"] = sizes["Total"] - without["Total"]
    return memory


def _tracked(config: Any, args: HDPOConfig, build: Build, with_workspace: bool) -> dict[str, int]:
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracker's, of modules it has seen before
        model = _prepare(build(config), args)
        optimizer = _optimizer(model, args)
        kept = _add_workspace(model, args) if with_workspace else []
        tracker = MemTracker()
        tracker.track_external(model, optimizer, *kept)
        with tracker:
            for _ in range(2):  # the optimizer's state is made in the first step
                for _ in range(min(args.gradient_accumulation_steps, 2)):  # a third has no more company than a second
                    _micro_batch(model, args, "cpu")
                    tracker.reset_mod_stats()
                optimizer.step()
                optimizer.zero_grad()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return {str(getattr(kind, "value", kind)): int(size) for kind, size in snapshot.items()}


def _add_workspace(model: nn.Module, args: HDPOConfig) -> list[Tensor]:
    """Let the head's call hold what its operator makes out of sight; returns what outlives the call, as on CPUs."""
    head, device = head_of(bare(model)), args.device
    vocab, hidden_size = head.weight.shape
    rows = 2 * args.per_device_train_batch_size * (args.max_length or 0)
    dtype = _autocast_dtype(args) or head.weight.dtype
    exact = args.gradient == "exact"
    piece_rows, _, tables = buffers_for(rows, vocab, dtype, exact, args.chunk_bytes, device)
    buffers = sum(count * vocab * table.itemsize for count, table in tables)
    # hidden states scaled by the gradient of their log-probs; weight and hidden states in the dtype of autocast; and
    # where GEMMs have no full-precision output, their operands upcast
    passing = min(piece_rows, rows) * hidden_size * dtype.itemsize
    if dtype != head.weight.dtype:
        passing += (vocab + rows) * hidden_size * dtype.itemsize
    if device.type == "cpu":
        passing += BLOCK_BYTES * (1 if exact else 6)  # scratch of row operations; rounding rows takes 64-bit integers
    if device.type == "cpu" and dtype.itemsize < 4:
        passing += min(UPCAST_BLOCK, vocab) * (hidden_size + (min(piece_rows, rows) if exact else 0)) * 4
    kept = [torch.empty(buffers, dtype=torch.uint8)] if device.type == "cpu" else []
    call: Callable[..., Any] = head.forward

    def forward(*inputs: Any, **keywords: Any) -> Any:
        held = torch.empty(passing + (0 if kept else buffers), dtype=torch.uint8)
        result = call(*inputs, **keywords)
        del held
        return result

    head.forward = forward  # type: ignore[method-assign]
    return kept


def step_seconds(config: Any, args: HDPOConfig, build: Build) -> float:
    """Time of an optimizer step: that of a shallow model, and for every further layer what one adds to it."""
    depth = config.get_text_config().num_hidden_layers
    if depth <= _LAYERS[1]:
        return _time(build(config), args)
    shallow, deeper = (_time(build(_with_layers(config, layers)), args) for layers in _LAYERS)
    return shallow + max(deeper - shallow, 0.0) * (depth - _LAYERS[0]) / (_LAYERS[1] - _LAYERS[0])


def _with_layers(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _time(model: nn.Module, args: HDPOConfig) -> float:
    model = _prepare(model.to(args.device), args)
    optimizer = _optimizer(model, args)
    seconds: list[float] = []
    while len(seconds) < 1 + _STEPS or sum(seconds[1:]) < _SECONDS:
        start = time.perf_counter()
        for _ in range(args.gradient_accumulation_steps):
            _micro_batch(model, args, args.device.type)
        optimizer.step()
        optimizer.zero_grad()
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _prepare(model: Any, args: HDPOConfig) -> nn.Module:
    """As the trainer does it."""
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
    # a softcap or scale costs nothing here, and finding it needs numbers
    attach_loss(bare(model), args.loss_kwargs(), HeadTransform(None, 1.0))
    return model.train()


def _optimizer(model: nn.Module, args: HDPOConfig) -> torch.optim.Optimizer:
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    return kind([p for p in model.parameters() if p.requires_grad], **options)


def _micro_batch(model: nn.Module, args: HDPOConfig, device: str) -> None:
    """Forward and backward; of the prompts only the last token, so that everything is scored that can be."""
    pairs, length = args.per_device_train_batch_size, int(args.max_length or 0)
    ids = torch.randint(head_of(bare(model)).weight.shape[0], (2 * pairs, length), device=device)
    starts = torch.arange(2 * pairs).unsqueeze(1) * length
    rows = (starts + torch.arange(length - 1)).flatten().to(device)
    bounds = list(itertools.accumulate([length - 1] * 2 * pairs, initial=0))
    batch = PairBatch(rows, ids[:, 1:].flatten(), bounds, torch.zeros(2 * pairs, device=device))
    dtype = _autocast_dtype(args)
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        loss = model(input_ids=ids, pairs=batch).loss / args.gradient_accumulation_steps
    loss.backward()


def _autocast_dtype(args: HDPOConfig) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
