"""What a run will need, before it starts: memory of one process by kind, and time for a step.

Memory: an optimizer step is run without memory or computation (FakeTensorMode) on tensors of the real sizes, and a
tracker adds up what is alive. Time: the same model with one layer and with four is really run on the device; time is
linear in their number. Of the model only the config is read. Micro-batches are taken to be as large as the options
allow (see `fullest`).
"""

import copy
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, Trainer

from hdpo_kernels.gemm import UPCAST_BLOCK
from hdpo_kernels.lm_head import buffers_for
from hdpo_kernels.rows.torch import BLOCK_BYTES
from hdpo_train.attention import can_attend_by_documents
from hdpo_train.config import HDPOConfig
from hdpo_train.files import readable
from hdpo_train.head import HeadTransform, attach_loss, bare, head_of
from hdpo_train.models import disable_dropout
from hdpo_train.packing import Layout, find_layout, lay_out, use_layout
from hdpo_train.reference import model_inputs
from hdpo_train.tiles import tile_mlps

_KINDS = {
    "weights": ("Parameter", "Buffer"), "gradients": ("Gradient",), "optimizer": ("Optstate",),
    "activations": ("Activation",),
}  # fmt: skip
_LAYERS = (1, 4)  # of the models that are timed
_SECONDS, _STEPS = 2.0, 5  # a model is timed for so long, and so often at least, after one step that is not
Build = Callable[[Any], nn.Module]  # from a config


class MicroBatch(NamedTuple):
    """Pairs of the same lengths, in tokens."""

    layout: Layout
    pairs: int
    prompt: int
    completion: int  # of chosen, and of rejected


class Memory(NamedTuple):
    """Bytes alive at the peak of an optimizer step."""

    device: dict[str, int]  # weights, gradients, optimizer, activations, other; head: what it adds to the peak
    host: int  # activations that are offloaded


class StepTime(NamedTuple):
    """Seconds of an optimizer step."""

    quartiles: list[float] | None  # None: the models of more layers took no longer, so that a layer has no price
    layers: int  # of the model
    timed: tuple[int, ...]  # layers of the models that were timed


class Plan(NamedTuple):
    """Of one process."""

    batch: MicroBatch
    memory: Memory
    time: StepTime


def make_plan(config: Any, args: HDPOConfig, build: Build | None = None) -> Plan:
    """config: the model's. build: what makes a model (or peft model) of it, default: AutoModelForCausalLM in fp32.

    Raises ValueError if max_length is None: the longest record would decide.
    """
    if args.max_length is None:
        raise ValueError("a plan needs --max_length: without it the longest record decides")
    build = build or AutoModelForCausalLM.from_config
    probed = bare(build(_with_layers(config, _LAYERS[0])))
    batch = fullest(args, find_layout([probed], args.packing, args.shared_prompt))
    return Plan(batch, peak_memory(config, args, batch, build), step_time(config, args, batch, build))


def fullest(args: HDPOConfig, layout: Layout) -> MicroBatch:
    """The micro-batch whose sequences have max_length tokens, prompts max_prompt_length of them (None: one token).

    Under max_tokens_per_batch its pairs are as many as reach the budget, and as much shorter as to keep within it.
    """
    length, budget = int(args.max_length or 0), args.max_tokens_per_batch
    prompt = min(args.max_prompt_length or 1, length - 1)
    batch = MicroBatch(layout, args.per_device_train_batch_size, prompt, length - prompt)
    if budget is None:
        return batch
    tokens = layout.tokens(prompt, batch.completion, batch.completion)
    pairs = min(batch.pairs, -(-budget // tokens))
    shorter = min(1.0, budget / (pairs * tokens)) if pairs > 1 else 1.0  # a longer pair is a batch of its own
    prompt, completion = (max(1, int(shorter * size)) for size in (prompt, batch.completion))
    return MicroBatch(layout, pairs, prompt, completion)


def describe(plan: Plan, args: HDPOConfig) -> str:
    device, total = args.device.type, sum(plan.memory.device.values())
    _, pairs, prompt, completion = plan.batch
    accumulated = f" of {args.gradient_accumulation_steps} micro-batches" * (args.gradient_accumulation_steps > 1)
    pairs *= args.gradient_accumulation_steps
    lines = [
        f"One process on {device}, steps{accumulated} of {pairs} pairs of 2 × {prompt + completion} tokens, "
        f"{plan.batch.layout}.",
        f"Taken as full: prompts of {prompt} tokens, completions of {completion}."
        + ("" if prompt == 1 else " Where prompts are shorter and completions longer, it is more."),
        "",
    ]
    lines += [f"  {name:12}{readable(size):>12}" for name, size in plan.memory.device.items()]
    lines += [f"  {'in all':12}{readable(total):>12} at the peak of a step"]
    if plan.memory.host:
        lines += [f"  {'on the host':12}{readable(plan.memory.host):>12} of offloaded activations"]
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        lines += [f"  {'free now':12}{readable(free):>12}" + ("" if total < free else ": it does not fit")]
    lines += ["", f"  {_describe_time(plan.time, tokens=2 * pairs * (prompt + completion))}"]
    if device == "cpu":
        lines += [
            "",
            "Tensors alone: a process on a CPU takes some 100 MiB more for code and what its allocator keeps.",
        ]
    return "\n".join(lines)


def _describe_time(time: StepTime, tokens: int) -> str:
    """tokens: of a step."""
    models = " and ".join(f"{layers}" for layers in time.timed)
    if time.quartiles is None:
        return (
            f"no seconds: models of {models} layers took equally long, so that the {time.layers} layers of this one "
            "cannot be extrapolated; try again when this machine is idle, or with more tokens in a micro-batch"
        )
    low, median, high = time.quartiles
    source = "measured" if time.timed == (time.layers,) else f"extrapolated from models of {models} layers"
    return f"{median:.3g} s a step ({low:.3g} to {high:.3g}), {tokens / median:,.0f} tokens/s; {source}"


def peak_memory(config: Any, args: HDPOConfig, batch: MicroBatch, build: Build) -> Memory:
    """head: what it adds to the peak."""
    (without, host), (sizes, _) = (_tracked(config, args, batch, build, workspace) for workspace in (False, True))
    memory = {name: sum(without[kind] for kind in kinds) for name, kinds in _KINDS.items()}
    memory["other"] = without["Total"] - sum(memory.values())
    memory["head"] = sizes["Total"] - without["Total"]
    return Memory(memory, host)


def _tracked(
    config: Any, args: HDPOConfig, batch: MicroBatch, build: Build, with_workspace: bool
) -> tuple[dict[str, int], int]:
    """Bytes at the peak by the tracker's kinds, and bytes that a micro-batch offloads."""
    with torch.device("meta"):  # peft moves adapters from device to device, which fake parameters do not bear
        model: Any = build(config)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracker's, of modules it has seen before
        model.to_empty(device="cpu")
        bare(model).tie_weights()
        _frozen_as_buffers(model)
        if not can_attend_by_documents(bare(model).config.get_text_config()):
            bare(model).set_attn_implementation("sdpa")  # other kernels do not run on fake tensors, and take as much
        offloaded = _prepare(model, args, batch.layout, fake=True)
        optimizer = _optimizer(model, args)
        kept = _add_workspace(model, args, batch) if with_workspace else []
        tracker = _Tracker()
        tracker.track_external(model, optimizer, *kept)
        with tracker:
            for _ in range(2):  # the optimizer's state is made in the first step
                for _ in range(min(args.gradient_accumulation_steps, 2)):  # a third has no more company than a second
                    offloaded.clear()
                    _micro_batch(model, args, batch, "cpu")
                    tracker.reset_mod_stats()
                optimizer.step()
                optimizer.zero_grad()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return {str(getattr(kind, "value", kind)): int(size) for kind, size in snapshot.items()}, sum(offloaded)


class _Tracker(MemTracker):
    def _update_peak_stats(self, peak_state: Any) -> None:
        """Of the whole; peaks of every module, kept at every operation, take minutes for a deep model."""
        for device, sizes in self._curr_mem_snap.items():
            if sizes["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device] = sizes["Total"]
                self._peak_mem_snap[device] = dict(sizes)


def _frozen_as_buffers(model: nn.Module) -> None:
    """The tracker wants a gradient of every parameter."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def _add_workspace(model: nn.Module, args: HDPOConfig, batch: MicroBatch) -> list[Tensor]:
    """Let the head's call hold what its operator makes out of sight; returns what outlives the call, as on CPUs."""
    head, device = head_of(bare(model)), args.device
    vocab, hidden_size = head.weight.shape
    rows = 2 * batch.pairs * batch.completion
    dtype = _autocast_dtype(args) or head.weight.dtype
    exact = args.gradient == "exact"
    piece_rows, _, tables = buffers_for(rows, vocab, dtype, exact, args.chunk_bytes, device)
    buffers = sum(count * vocab * table.itemsize for count, table in tables)
    d_weight_rows = min(piece_rows, rows) if head.weight.requires_grad else 0
    # hidden states scaled by the gradient of their log-probs; weight and hidden states in the dtype of autocast; and
    # where GEMMs have no full-precision output, their operands upcast
    passing = d_weight_rows * hidden_size * dtype.itemsize
    if dtype != head.weight.dtype:
        passing += (vocab + rows) * hidden_size * dtype.itemsize
    if device.type == "cpu":
        passing += BLOCK_BYTES * (1 if exact else 6)  # scratch of row operations; rounding rows takes 64-bit integers
    if device.type == "cpu" and dtype.itemsize < 4:
        passing += min(UPCAST_BLOCK, vocab) * (hidden_size + d_weight_rows * exact) * 4
    kept = [torch.empty(buffers, dtype=torch.uint8)] if device.type == "cpu" else []
    call: Callable[..., Any] = head.forward

    def forward(*inputs: Any, **keywords: Any) -> Any:
        held = torch.empty(passing + (0 if kept else buffers), dtype=torch.uint8)
        result = call(*inputs, **keywords)
        del held
        return result

    head.forward = forward  # type: ignore[method-assign]
    return kept


def step_time(config: Any, args: HDPOConfig, batch: MicroBatch, build: Build) -> StepTime:
    """A shallow model's time, and for every further layer what one adds to it, turn by turn of the timing."""
    depth = config.get_text_config().num_hidden_layers
    if depth <= _LAYERS[1]:
        return StepTime(statistics.quantiles(_time([build(config)], args, batch)[0], n=4), depth, (depth,))
    shallow, deeper = _time([build(_with_layers(config, layers)) for layers in _LAYERS], args, batch)
    a_layer = [(more - few) / (_LAYERS[1] - _LAYERS[0]) for few, more in zip(shallow, deeper, strict=True)]
    if statistics.median(a_layer) <= 0:
        return StepTime(None, depth, _LAYERS)
    further = depth - _LAYERS[0]
    steps = [few + max(price, 0.0) * further for few, price in zip(shallow, a_layer, strict=True)]
    return StepTime(statistics.quantiles(steps, n=4), depth, _LAYERS)


def _with_layers(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _time(models: list[Any], args: HDPOConfig, batch: MicroBatch) -> list[list[float]]:
    """Seconds of each model's steps; the models take turns, so that a machine's mood is the same for all."""
    for model in models:
        _prepare(model.to(args.device), args, batch.layout)
    optimizers = [_optimizer(model, args) for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    while len(seconds[0]) < 1 + _STEPS or sum(sum(times[1:]) for times in seconds) < _SECONDS * len(models):
        for model, optimizer, times in zip(models, optimizers, seconds, strict=True):
            start = time.perf_counter()
            for _ in range(args.gradient_accumulation_steps):
                _micro_batch(model, args, batch, args.device.type)
            optimizer.step()
            optimizer.zero_grad()
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return [times[1:] for times in seconds]


def _prepare(model: Any, args: HDPOConfig, layout: Layout, fake: bool = False) -> list[int]:
    """As the trainer does it. fake: what would be offloaded takes no memory; the result gets its sizes in bytes."""
    offloaded: list[int] = []
    if args.gradient_checkpointing:
        options: dict[str, Any] = dict(args.gradient_checkpointing_kwargs or {})  # type: ignore[arg-type]
        layers, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
        # its name from transformers 5.23 on
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options or None, every_n_layers=layers, offload=offload and not fake)
        if offload and fake:
            _offload_nowhere(model, offloaded)
    if args.disable_dropout:
        disable_dropout(model)
    use_layout(bare(model), layout)
    if args.tiled_mlp:
        tile_mlps(bare(model))
    # a softcap or scale costs nothing here, and finding it needs numbers
    attach_loss(bare(model), HeadTransform(None, 1.0))
    model.train()
    return offloaded


def _offload_nowhere(model: nn.Module, offloaded: list[int]) -> None:
    """What checkpointed layers save for their recomputation is noted, forgotten, and made anew when it is wanted."""

    def forget(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        offloaded.append(tensor.nbytes)
        return tensor.shape, tensor.dtype

    def make(saved: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(saved[0], dtype=saved[1])

    def checkpoint(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        with saved_tensors_hooks(forget, make):
            return function(*inputs, **options)

    for module in model.modules():
        if isinstance(function := getattr(module, "_gradient_checkpointing_func", None), functools.partial):
            module._gradient_checkpointing_func = functools.partial(checkpoint, function)  # type: ignore[assignment]


def _optimizer(model: nn.Module, args: HDPOConfig) -> torch.optim.Optimizer:
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    return kind([p for p in model.parameters() if p.requires_grad], **options)


def _micro_batch(model: nn.Module, args: HDPOConfig, batch: MicroBatch, device: str) -> None:
    """Forward and backward."""
    vocab = head_of(bare(model)).weight.shape[0]
    prompt, completion = ([token % vocab for token in range(size)] for size in (batch.prompt, batch.completion))
    inputs = lay_out([(prompt, completion, completion)] * batch.pairs, batch.layout, 0)
    inputs["ref_logps"] = torch.zeros(2 * batch.pairs)
    dtype = _autocast_dtype(args)
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        loss = (
            model(**model_inputs(inputs, torch.device(device), args.loss_kwargs())).loss
            / args.gradient_accumulation_steps
        )
    loss.backward()


def _autocast_dtype(args: HDPOConfig) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
