"""How long does one optimizer step take, end to end, beside TRL's DPOTrainer on the same model and pairs?"""

import contextlib
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.contest import OUR_RATIO
from benchmarks.contestants import Contestant
from benchmarks.harness import (
    NEVER,
    Deadline,
    attempt,
    in_fresh_process,
    peak_bytes,
    quartiles,
    ratio,
    start_afresh,
    synchronize,
)
from benchmarks.table import Table, installed
from hdpo_train.in_trl import linear_logp_in_trl

OURS, TRL = "hdpo_train", "trl"
UNSHARED, IN_TRL = f"{OURS}, prompts twice", f"{TRL}, linear_logp"
OUR_CPU_RATIO, OUR_MEMORY_RATIO = "our CPU time / its CPU time", "our peak / its peak"
OVER_TRL = "{} / trl's"  # time, CPU time and peak memory of linear_logp in TRL
WARM_UP, STEPS = 1, 6  # optimizer steps of a run: not timed, timed
Lengths = tuple[int, int, int]  # tokens of prompt, chosen and rejected


class Setup(NamedTuple):
    """A random Llama and the pairs of a run."""

    name: str
    vocab: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    pairs: int = 1  # in a batch
    lengths: Sequence[Lengths] = ()  # of every pair of a run
    checkpointing: bool = False  # of activations

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return len(self.lengths) // self.pairs

    @property
    def batch_tokens(self) -> float:
        """Of an average batch, prompts counted twice, as the loss is defined."""
        return sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in self.lengths) / self.steps


TINY = Setup("Llama, 2 layers, V=1000 H=64", 1000, 64, 128, 2, 2, 2)
SMALL = Setup("Llama, 4 layers, V=32000 H=256", 32000, 256, 768, 4, 4, 4)
LARGE = Setup("Llama of Qwen2.5-0.5B's sizes", 151936, 896, 4864, 24, 14, 2)


def shapes(device: str, quick: bool) -> list[Setup]:
    """What matters most comes first."""
    if quick:
        return [_drawn(TINY, pairs=2, tokens=64)]
    if device == "cpu":
        return [_drawn(SMALL, 2, 256), _like_gsm8k(SMALL), _drawn(SMALL, 2, 256, 0.25), _drawn(SMALL, 2, 256, 0.75)]
    mean, *long = (_drawn(LARGE, pairs, tokens) for pairs, tokens in ((4, 2048), (1, 8192), (1, 32768)))
    return [mean, _like_gsm8k(LARGE), _drawn(LARGE, 4, 2048, 0.25), _drawn(LARGE, 4, 2048, 0.75), *long]


def _drawn(model: Setup, pairs: int, tokens: int, prompt: float = 0.5) -> Setup:
    """Each part of a pair has between 0.4 and 1.6 times its average length; the same ones every time.

    tokens: of a sequence, on average. prompt: its share of them.
    """
    rng = random.Random(0)

    def draw(share: float) -> int:
        return round(share * tokens * rng.uniform(0.4, 1.6))

    lengths = [(draw(prompt), draw(1 - prompt), draw(1 - prompt)) for _ in range(pairs * (WARM_UP + STEPS))]
    name = f"{model.name}, {pairs} pair{'s' * (pairs > 1)}, about {tokens} tokens a sequence, {prompt:.0%} prompt"
    return model._replace(name=name, pairs=pairs, lengths=lengths)


def _like_gsm8k(model: Setup) -> Setup:
    """Eight short pairs, whose lengths have the medians and spreads of GSM8K's questions and models' solutions."""
    rng = random.Random(0)

    def draw(median: int, spread: float) -> int:
        return round(rng.lognormvariate(math.log(median), spread))

    lengths = [(draw(60, 0.34), draw(125, 0.4), draw(125, 0.4)) for _ in range(8 * (WARM_UP + STEPS))]
    return model._replace(name=f"{model.name}, 8 pairs as long as GSM8K's", pairs=8, lengths=lengths)


def measure(
    table: Table, setup: Setup, contestants: Sequence[Contestant], rounds: int, deadline: Deadline = NEVER
) -> None:
    names = present(contestants)
    compare(table, "train_step", setup, [*names, *[IN_TRL] * (TRL in names)], deadline)


def present(contestants: Sequence[Contestant]) -> list[str]:
    """Our trainer, and TRL's if TRL is among the contestants."""
    return [OURS, *(contestant.name for contestant in contestants if contestant.name == TRL)]


def compare(table: Table, question: str, setup: Setup, names: Sequence[str], deadline: Deadline = NEVER) -> None:
    """Trainers take turns by whole runs, in the order given, then in reverse; where time is short, once."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    slowest = 0.0  # seconds of a run
    for order in (names, names[::-1]):
        if order is not names and deadline.left < slowest * len(runs):
            break
        for name in (each for each in order if each in runs):
            if order is names:
                deadline.check(slowest)
            begin = time.monotonic()
            run, status = None, "not installed" if package(name) and not installed(TRL) else ""
            if not status:
                run, status = attempt(partial(train, name, setup, table.device))
            slowest = max(slowest, time.monotonic() - begin)
            if run is not None:
                status = run.wrong
            if run is None or status:
                del runs[name]
                table.add_status(question, setup.name, name, status, package(name))
                continue
            runs[name].append(run)

    def pooled(name: str, clock: str) -> list[float]:
        return [seconds for run in runs[name] for seconds in getattr(run, clock)]

    clocks = [("time", OUR_RATIO, "seconds")]
    if table.device == "cpu":  # on a GPU it is the host's, which waits
        clocks.append(("CPU time", OUR_CPU_RATIO, "cpu_seconds"))
    peaks = {name: statistics.median(run.peak_mib for run in each) for name, each in runs.items()}
    for name in runs:
        add = partial(table.add, question, setup.name, name, package=package(name))
        compared = name != OURS and OURS in runs
        for metric, ours_over_its, clock in clocks:
            median, low, high = quartiles(pooled(name, clock))
            add(metric, (1e3 * median, 1e3 * low, 1e3 * high), "ms")
            if metric == "time":
                speeds = (setup.batch_tokens / seconds for seconds in (median, high, low))
                add("speed", tuple(speeds), "tokens/s")
            if compared:
                add(ours_over_its, ratio(pooled(OURS, clock), pooled(name, clock)), "×")
        add("peak memory", (peaks[name],), "MiB")
        if compared:
            add(OUR_MEMORY_RATIO, (peaks[OURS] / peaks[name],), "×")
        if name == IN_TRL and TRL in runs:
            for metric, _, clock in clocks:
                add(OVER_TRL.format(metric), ratio(pooled(name, clock), pooled(TRL, clock)), "×")
            add(OVER_TRL.format("peak memory"), (peaks[name] / peaks[TRL],), "×")


def package(name: str) -> str:
    return TRL if name in (TRL, IN_TRL) else ""


class Run(NamedTuple):
    """Optimizer steps of a trainer that logs each of them."""

    seconds: list[float]  # of each step after the warm-up, from its predecessor's end to its own
    cpu_seconds: list[float]  # of this process in them, all threads
    peak_mib: float  # above model and data
    losses: list[float]

    @property
    def wrong(self) -> str:
        """In a few words, if it is: the loss starts at log 2, policy and reference being the same."""
        first = self.losses[0]
        return f"wrong: the loss starts at {first:.4g}, not at log 2" if abs(first - math.log(2)) > 0.01 else ""


def train(name: str, setup: Setup, device: str) -> Run:
    """A run of the trainer of this name, on a CPU in a process of its own."""
    if device == "cpu":
        return in_fresh_process(_train, name, setup, device)
    return _train(name, setup, device)


def _train(name: str, setup: Setup, device: str) -> Run:
    start_afresh()
    inside = linear_logp_in_trl() if name == IN_TRL else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, inside:
        return timed(_trainer(name, setup, device, Path(folder)), device)


def timed(trainer: Any, device: str, warm_up: int = WARM_UP) -> Run:
    """Let a trainer take its steps."""
    from transformers import PrinterCallback, TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.stops: list[tuple[float, float]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            self.stops.append((time.perf_counter(), time.process_time()))

        on_train_begin = on_step_end

    stopwatch = Stopwatch()
    trainer.add_callback(stopwatch)
    trainer.remove_callback(PrinterCallback)
    peak = peak_bytes(trainer.train, device)
    steps = list(pairwise(stopwatch.stops[warm_up:]))
    seconds, cpu_seconds = ([end[clock] - start[clock] for start, end in steps] for clock in (0, 1))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Run(seconds, cpu_seconds, peak / 2**20, losses)


def _trainer(name: str, setup: Setup, device: str, folder: Path) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setup.vocab,
        hidden_size=setup.hidden_size,
        intermediate_size=setup.intermediate_size,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        num_key_value_heads=setup.kv_heads,
        max_position_embeddings=max(prompt + max(both) for prompt, *both in setup.lengths),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=setup.vocab - 2,
        pad_token_id=setup.vocab - 1,
    )
    options: dict[str, Any] = dict(
        per_device_train_batch_size=setup.pairs,
        max_steps=setup.steps,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        gradient_checkpointing=setup.checkpointing,
    )
    options |= {"shared_prompt": False} if name == UNSHARED else {}
    return make_trainer(name, folder, LlamaForCausalLM(config), _tokenizer(setup.vocab), _records(setup), options)


def make_trainer(
    name: str, folder: Path, model: Any, tokenizer: Any, records: Sequence[Any], options: dict[str, Any]
) -> Any:
    """DPO (α = 1) with the reference's log-probs computed beforehand, all options that both trainers have the same.

    Args:
        name: TRL or IN_TRL, or else ours.
        folder: for what the run writes.
        records: prompt, chosen and rejected of each pair.
        options: of the run, beside those that all runs here have.
    """
    from datasets import Dataset

    options = {
        "output_dir": str(folder / "run"),
        "beta": 0.1,
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        **options,
    }
    given = {"model": model, "train_dataset": Dataset.from_list(list(records)), "processing_class": tokenizer}
    if not package(name):
        from hdpo_train import HDPOConfig, HDPOTrainer

        return HDPOTrainer(args=HDPOConfig(ref_cache_dir=str(folder / "reference"), **options), **given)
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(args=DPOConfig(precompute_ref_log_probs=True, **options), **given)


def _records(setup: Setup) -> list[dict[str, str]]:
    """Random tokens, written as numbers; the tokenizer's EOS is the last token of a completion."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(str(rng.randrange(setup.vocab - 2)) for _ in range(count))

    return [
        {"prompt": words(prompt), "chosen": f" {words(chosen - 1)}", "rejected": f" {words(rejected - 1)}"}
        for prompt, chosen, rejected in setup.lengths
    ]


def _tokenizer(vocab: int) -> Any:
    """A word is the number of its token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(token): token for token in range(vocab - 2)} | {"<eos>": vocab - 2, "<pad>": vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
