"""What a run will need, before it starts: memory of one process by kind, and time for a step.

Memory: see `memory`. Time: the same model with one layer and with four is really run on the device; time is linear in
their number. Of the model only the config is read. Micro-batches are taken to be as large as the options allow (see
`fullest`).
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from hdpo_train.config import HDPOConfig, PlanConfig
from hdpo_train.files import readable
from hdpo_train.model.head import bare
from hdpo_train.model.packing import Layout, find_layout
from hdpo_train.plan.memory import Memory, MicroBatch, make_optimizer, micro_batch, prepare, step_memory

_LAYERS = (1, 4)  # of the models that are timed
_SECONDS, _STEPS = 2.0, 5  # a model is timed for so long, and so often at least, after one step that is not
_LONG, _LEAST_STEPS = 60.0, 3  # but where steps are so long, in seconds, no oftener than this
_FEW_TOKENS = 256  # vocabulary of the model whose attention is probed
Build = Callable[[Any], nn.Module]  # from a config


class StepTime(NamedTuple):
    """Seconds of an optimizer step, or why there are none."""

    quartiles: list[float] | None  # low, median and high of the steps timed, so in this order
    layers: int  # of the model
    timed: tuple[int, ...]  # layers of the models that were timed
    reason: str = ""  # why there are no quartiles


def print_plan(config: Any, args: PlanConfig, build: Build, say: Callable[[str], None]) -> None:
    """Print memory, then time, of the steps of a run.

    Args:
        config: the model's.
        args: of the run.
        build: what makes a model (or peft model) of a config.
        say: is told what takes time now.

    Raises ValueError if max_length is None: the longest record would decide.
    """
    if args.max_length is None:
        raise ValueError("a plan needs --max_length: without it the longest record decides")
    batch = fullest(args, layout_of(config, args, build))._replace(ranks=args.sp_size)
    plain = peak_memory(config, args, batch, build, shards=args.shards)
    tiled = peak_memory(config, args, batch, build, True, args.shards) if args.tiled_layers is None else None
    print(describe_memory(plain, args, batch, tiled), flush=True)
    if args.shards > 1 or args.sp_size > 1:
        print("\nno seconds: a step is timed in one process, and this one shares its work with others")
        return
    say("timing some steps of a shallow model")
    tokens = sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in batch.pairs)
    time = step_time(config, args, batch, build)
    print("\n" + describe_time(time, tokens * args.gradient_accumulation_steps))


def layout_of(config: Any, args: HDPOConfig, build: Build) -> Layout:
    """The layout that a run would choose, by a probe of a model of one layer and few tokens."""
    config = _with_layers(config, 1)
    text = config.get_text_config()
    if text.vocab_size > _FEW_TOKENS:
        text.vocab_size, text.pad_token_id = _FEW_TOKENS, None
    return find_layout([bare(build(config))], args.packing, args.shared_prompt)


def peak_memory(
    config: Any, args: HDPOConfig, batch: MicroBatch, build: Build, tiles: bool = False, shards: int = 1
) -> Memory:
    """tiles, shards: see `step_memory`."""
    with torch.device("meta"):
        model = build(config)
    return step_memory(model, args, batch, tiles, shards)


def fullest(args: HDPOConfig, layout: Layout) -> MicroBatch:
    """The micro-batch whose sequences have max_length tokens, prompts max_prompt_length of them (None: one token).

    Under max_tokens_per_batch its pairs are as many as reach the budget, and as much shorter as to keep within it.
    """
    length, budget = int(args.max_length or 0), args.max_tokens_per_batch
    prompt = min(args.max_prompt_length or 1, length - 1)
    completion, pairs = length - prompt, args.per_device_train_batch_size
    if budget is not None:
        tokens = layout.tokens(prompt, completion, completion)
        pairs = min(pairs, -(-budget // tokens))
        shorter = min(1.0, budget / (pairs * tokens)) if pairs > 1 else 1.0  # a longer pair is a batch of its own
        prompt, completion = (max(1, int(shorter * size)) for size in (prompt, completion))
    return MicroBatch(layout, [(prompt, completion, completion)] * pairs)


def describe_memory(memory: Memory, args: PlanConfig, batch: MicroBatch, tiled: Memory | None = None) -> str:
    """tiled: the same step with layers in tiles, if the run may turn to them by itself."""
    prompt, completion, _ = batch.pairs[0]
    pairs, steps = len(batch.pairs), args.gradient_accumulation_steps
    accumulated = f" of {steps} micro-batches" * (steps > 1)
    lines = [
        f"{one_process(args)} on {args.device.type}, steps{accumulated} of {pairs * steps} pairs of "
        f"2 × {prompt + completion} tokens, {batch.layout}.",
        f"Taken as full: prompts of {prompt} tokens, completions of {completion}."
        + ("" if prompt == 1 else " Where prompts are shorter and completions longer, it is more."),
        "",
        *by_kind(memory),
    ]
    if tiled is not None and tiled.total < memory.total:
        lines.append(f"  {'in tiles':12}{readable(tiled.total):>12} as a run computes layers if a step would not fit")
    if (free := free_bytes(args)) is not None:
        fits = "" if (tiled or memory).total < free else ": it does not fit"
        lines += [f"  {'free now':12}{readable(free):>12}{fits}"]
    if args.device.type == "cpu":
        lines += [
            "",
            "Tensors alone: a process on a CPU takes some 100 MiB more for code and what its allocator keeps.",
        ]
    return "\n".join(lines)


def one_process(args: PlanConfig) -> str:
    """In words: which part of the work is its."""
    parts = [f"shards on {args.shards}"] * (args.shards > 1) + [f"sequences on {args.sp_size}"] * (args.sp_size > 1)
    return f"One process ({', '.join(parts)})" if parts else "One process"


def by_kind(memory: Memory) -> list[str]:
    """Lines of a table."""
    lines = [f"  {name:12}{readable(size):>12}" for name, size in memory.device.items()]
    lines += [f"  {'in all':12}{readable(memory.total):>12} at the peak of a step"]
    if memory.host:
        lines += [f"  {'on the host':12}{readable(memory.host):>12} of offloaded activations"]
    return lines


def free_bytes(args: HDPOConfig) -> int | None:
    """Free bytes of the GPU now; None if the run has none, or it is not here."""
    return torch.cuda.mem_get_info()[0] if args.device.type == "cuda" and torch.cuda.is_available() else None


def describe_time(time: StepTime, tokens: int) -> str:
    """tokens: of a step."""
    if time.quartiles is None:
        return f"no seconds: {time.reason}"
    low, median, high = time.quartiles
    source = "measured" if time.timed == (time.layers,) else f"extrapolated from models of {_words(time.timed)} layers"
    return f"{median:.3g} s a step ({low:.3g} to {high:.3g}), {tokens / median:,.0f} tokens/s; {source}"


def step_time(config: Any, args: HDPOConfig, batch: MicroBatch, build: Build) -> StepTime:
    """The time of a shallow model, plus what one layer adds to it for every further layer, taken in the same turn."""
    depth = config.get_text_config().num_hidden_layers
    timed = (depth,) if depth <= _LAYERS[1] else _LAYERS
    if args.device.type == "cuda" and not torch.cuda.is_available():
        return StepTime(None, depth, timed, "there is no GPU here to time a step on")
    configs = [_with_layers(config, layers) for layers in timed]
    needed = sum(peak_memory(each, args, batch, build).total for each in configs)
    there = psutil.virtual_memory().available if args.device.type == "cpu" else free_bytes(args)
    if there is not None and needed > there:
        reason = f"models of {_words(timed)} layers take {readable(needed)} to be timed, and {readable(there)} are free"
        return StepTime(None, depth, timed, reason)
    turns = _time([build(each) for each in configs], args, batch)
    if len(timed) == 1:
        return StepTime(statistics.quantiles(turns[0], n=4), depth, timed)
    shallow, deeper = turns
    a_layer = [(more - few) / (_LAYERS[1] - _LAYERS[0]) for few, more in zip(shallow, deeper, strict=True)]
    if statistics.median(a_layer) <= 0:
        reason = (
            f"models of {_words(timed)} layers took equally long, so that the {depth} layers of this one cannot be "
            "extrapolated; try again when this machine is idle, or with more tokens in a micro-batch"
        )
        return StepTime(None, depth, timed, reason)
    further = depth - _LAYERS[0]
    steps = [few + max(price, 0.0) * further for few, price in zip(shallow, a_layer, strict=True)]
    return StepTime(statistics.quantiles(steps, n=4), depth, timed)


def _words(layers: tuple[int, ...]) -> str:
    return " and ".join(map(str, layers))


def _with_layers(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _time(models: list[Any], args: HDPOConfig, batch: MicroBatch) -> list[list[float]]:
    """Seconds of each model's steps. The models take turns, so that a slow moment of the machine meets all of them."""
    for model in models:
        prepare(model.to(args.device), args, batch)
    optimizers = [make_optimizer(model, args) for model in models]
    seconds: list[list[float]] = [[] for _ in models]  # the first turn's are not counted

    def enough() -> bool:
        turns, spent = len(seconds[0]) - 1, sum(sum(times[1:]) for times in seconds)
        return (turns >= _STEPS and spent >= _SECONDS * len(models)) or (turns >= _LEAST_STEPS and spent >= _LONG)

    while not enough():
        for model, optimizer, times in zip(models, optimizers, seconds, strict=True):
            start = time.perf_counter()
            for _ in range(args.gradient_accumulation_steps):
                micro_batch(model, args, batch, args.device.type)
            optimizer.step()
            optimizer.zero_grad()
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return [times[1:] for times in seconds]
