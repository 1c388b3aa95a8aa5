"""The longest pair of which a step fits into some memory, and the options that would lengthen it.

What is alive in one part of a step is linear in the length, or nearly (see `Memory.moments`): two lengths tell where
the first part would not fit any more, and a step of that length is then checked.
"""

import copy
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from hdpo_train.config import PlanConfig, ScriptArguments
from hdpo_train.files import readable
from hdpo_train.model.loading import max_positions
from hdpo_train.plan.memory import Memory, MicroBatch
from hdpo_train.plan.step import Build, by_kind, free_bytes, layout_of, one_process, peak_memory

_SIZE = re.compile(r"([0-9]+\.?[0-9]*(?:e[0-9]+)?) *(?:([KMGT])(i?)B|B?)", re.IGNORECASE)
_SHORT = 32768  # tokens of a sequence: there, and at twice as many, memory has become linear
_MULTIPLE = 128  # the longest length is a multiple of it
_LIMIT = 2**24  # where memory does not grow
_NEAR = 0.01  # of the memory or the length: the search ends
_RUNS = 12  # at most; where memory is linear, four
Builder = Callable[[ScriptArguments], Build]


class Option(NamedTuple):
    """A change of options, in words of the command line."""

    words: str
    script: ScriptArguments
    args: PlanConfig


def size_of(text: str, args: PlanConfig) -> float:
    """Bytes that --fit names. Raises ValueError for what is no size, or none where no GPU says what is free."""
    if text == "free":
        free = free_bytes(args)
        if free is None:
            raise ValueError("--fit needs a size, as in --fit 79GiB: only a GPU that is here says what is free")
        return free
    match = _SIZE.fullmatch(text)
    if match is None or not float(match[1]):
        raise ValueError(f"--fit {text} is no size: write 79GiB, 79GB or 80e9 (bytes)")
    number, prefix, binary = match.groups()
    power = " KMGT".index(prefix.upper()) if prefix else 0
    return float(number) * (1024 if binary else 1000) ** power


def print_fit(
    config: Any, script: ScriptArguments, args: PlanConfig, builder: Builder, say: Callable[[str], None]
) -> None:
    """Print the longest pair that fits, what takes the memory there, and what options would do.

    Args:
        config: the model's.
        script, args: options of the run; --max_length and the size of a micro-batch have no part in it.
        builder: of `build`, see `print_plan`, by such options.
        say: is told what takes time now.
    """
    budget = size_of(str(args.fit), args)

    def search(option: Option, extrapolate: bool) -> tuple[int, Memory]:
        layout = layout_of(config, option.args, builder(option.script))

        def memory(length: int) -> Memory:
            batch = MicroBatch(layout, [_pair(length, option.args)], option.args.sp_size)
            # left to itself, a run turns to tiles where a step would not fit
            tiles = option.args.tiled_layers is None
            return peak_memory(config, option.args, batch, builder(option.script), tiles, option.args.shards)

        return longest(memory, budget, 2 * _prompt(option.args), extrapolate)

    say(f"searching the longest pair that fits into {readable(budget)}")
    length, memory = search(Option("", script, args), extrapolate=False)
    print(_describe(length, memory, budget, config, args), flush=True)
    found = []
    for option in options(script, args):
        say(f"with {option.words}")
        try:
            found.append((search(option, extrapolate=True)[0], option.words))
        except ValueError as error:  # it is not for this model
            say(f"{option.words}: {error}")
    if found:
        print("\n" + _describe_options(length, found))


def _prompt(args: PlanConfig) -> int:
    return args.max_prompt_length or 1


def _pair(length: int, args: PlanConfig) -> tuple[int, int, int]:
    return _prompt(args), length - _prompt(args), length - _prompt(args)


def longest(
    memory: Callable[[int], Memory], budget: float, least: int, extrapolate: bool = False
) -> tuple[int, Memory]:
    """The longest length, a multiple of 128, whose memory is within the budget; 0 if none is.

    Args:
        memory: of a length, which takes seconds.
        budget: bytes.
        least: a length below which none makes sense.
        extrapolate: a length far off is not looked at, but said by what nearer ones take.

    Returns it and its memory, or that of another length for one that was not looked at, and for 0.
    """
    known: dict[int, Memory] = {}

    def at(length: int) -> Memory:
        known[length] = known.get(length) or memory(length)
        return known[length]

    least = -(-max(least, 1) // _MULTIPLE) * _MULTIPLE
    start = max(_SHORT, least)
    while at(start).total > budget:
        if start == least:
            return 0, at(start)
        start = max(start // 8 // _MULTIPLE * _MULTIPLE, least)
    at(2 * start)
    sides: list[bool] = []  # of what was tried, whether it fits
    while len(known) < _RUNS:
        fits = max(length for length, each in known.items() if each.total <= budget)
        fails = min((length for length, each in known.items() if each.total > budget), default=None)
        low, high = (fits, fails) if fails else sorted(known)[-2:]
        if fails and sides[-2:] in ([True, True], [False, False]):  # far from linear
            guess = math.sqrt(fits * fails)
        else:
            guess = _where_full(low, at(low), high, at(high), budget)
        length = int(guess) // _MULTIPLE * _MULTIPLE
        if extrapolate and length > 2 * _SHORT:
            return length, at(fits)
        near = fails is not None and fails - fits <= max(_MULTIPLE, _NEAR * fits)
        if near or length <= fits or at(fits).total >= (1 - _NEAR) * budget:
            break
        sides.append(at(length).total <= budget)
    fits = max(length for length, each in known.items() if each.total <= budget)
    return fits, at(fits)


def _where_full(short: int, at_short: Memory, long: int, at_long: Memory, budget: float) -> float:
    """The length at which the first part of a step reaches the budget, all of them being linear."""
    lengths = [float(_LIMIT)]
    for low, high in zip(at_short.moments, at_long.moments, strict=True):
        slope = (sum(high.values()) - sum(low.values())) / (long - short)
        if slope > 0:
            lengths.append(short + (budget - sum(low.values())) / slope)
    return min(lengths)


def options(script: ScriptArguments, args: PlanConfig) -> list[Option]:
    """Options that save memory and are off, each alone on top of those given."""
    found = []

    def add(words: str, of_script: dict[str, Any] | None = None, **of_args: Any) -> None:
        changed = copy.copy(script), copy.copy(args)
        for target, values in zip(changed, (of_script or {}, of_args), strict=True):
            for name, value in values.items():
                setattr(target, name, value)
        found.append(Option(words, *changed))

    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    if not args.gradient_checkpointing:
        add("--gradient_checkpointing True", gradient_checkpointing=True)
    elif args.device.type != "cpu" and not checkpointing.get("offload"):
        kwargs = {**checkpointing, "offload": True}
        add("--gradient_checkpointing_kwargs '{\"offload\": true}'", gradient_checkpointing_kwargs=kwargs)
    if args.tiled_layers is False:
        add("--tiled_layers True", tiled_layers=True)
    if args.shared_prompt is False:
        add("--shared_prompt True", shared_prompt=None)
    if args.packing is False:
        add("--packing True", packing=None)
    if args.gradient == "exact":
        add("--gradient sampled", gradient="sampled")
    if script.dtype == "float32":
        add("--dtype bfloat16", {"dtype": "bfloat16"})
    if not script.use_peft:
        add("--use_peft True", {"use_peft": True})
        if "adafactor" not in args.optim:
            add("--optim adafactor", optim=type(args.optim)("adafactor"))
    return found


def _describe(length: int, memory: Memory, budget: float, config: Any, args: PlanConfig) -> str:
    if not length:
        shortest = -(-2 * _prompt(args) // _MULTIPLE) * _MULTIPLE
        first = (
            f"No pair fits into {readable(budget)} of {one_process(args).lower()} on {args.device.type}. "
            f"One of 2 × {shortest} tokens takes:"
        )
        return "\n".join([first, "", *by_kind(memory)])
    prompt, completion, _ = _pair(length, args)
    lines = [
        f"Longest pair that fits into {readable(budget)} of {one_process(args).lower()} on {args.device.type}: "
        f"2 × {length:,} tokens.",
        f"One pair a micro-batch; a prompt of {prompt} token{'s' * (prompt > 1)}, completions of {completion:,} each.",
        "",
        *by_kind(memory),
    ]
    most = max_positions(config)
    if most is not None and length > most:
        lines += [
            "",
            f"The model is made for {most:,} tokens: whether it is any good beyond is not a question of memory.",
        ]
    return "\n".join(lines)


def _describe_options(length: int, found: list[tuple[int, str]]) -> str:
    """found: the longest length with an option, and the option in words."""
    lines = ["Longest pair with one more option, extrapolated from two lengths:"]
    helpful = [(longer, words) for longer, words in found if longer >= (1 + _NEAR) * max(length, 1)]
    for longer, words in sorted(helpful, reverse=True):
        tokens = f"{longer:,}" if longer < _LIMIT else "no limit"
        times = f"({longer / length:.3g} ×)" if length and longer < _LIMIT else ""
        lines.append(f"  {tokens:>12}  {times:>9}  {words}")
    if useless := [words for pair, words in found if (pair, words) not in helpful]:
        lines.append(f"No longer pair with {', '.join(useless)}.")
    return "\n".join(lines)
