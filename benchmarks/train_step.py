"""How long does one optimizer step take, end to end, beside TRL's DPOTrainer on the same model and pairs?"""

import math
import random
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.contest import OUR_RATIO
from benchmarks.contestants import Contestant
from benchmarks.harness import NEVER, Deadline, attempt, peak_bytes, quartiles, ratio, start_afresh, synchronize
from benchmarks.table import Table, installed

OURS, TRL = "hdpo_train", "trl"
WARM_UP, STEPS = 2, 6  # optimizer steps of a run: not timed, timed


class Setup(NamedTuple):
    """A random Llama and what a batch is made of."""

    name: str
    vocab: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    pairs: int  # in a batch
    tokens: int  # in a sequence, on average
    prompt: float = 0.5  # share of a sequence
    ragged: bool = False  # lengths between 0.4 and 1.6 times the average; otherwise all the same
    checkpointing: bool = False  # of activations
    steps: int = WARM_UP + STEPS  # optimizer steps of a run

    @property
    def lengths(self) -> list[tuple[int, int, int]]:
        """Tokens of prompt, chosen and rejected of every pair of a run."""
        rng = random.Random(0)
        prompt = round(self.prompt * self.tokens)

        def draw(mean: int) -> int:
            return round(mean * rng.uniform(0.4, 1.6)) if self.ragged else mean

        pairs = range(self.pairs * self.steps)
        return [(draw(prompt), draw(self.tokens - prompt), draw(self.tokens - prompt)) for _ in pairs]

    @property
    def batch_tokens(self) -> float:
        """Of an average batch, prompts counted twice, as the loss is defined."""
        return sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in self.lengths) / self.steps


def shapes(device: str, quick: bool) -> list[Setup]:
    if quick:
        return [Setup("Llama, 2 layers, V=1000 H=64", 1000, 64, 128, 2, 2, 2, 2, 64)]
    if device == "cpu":
        small = Setup("Llama, 4 layers, V=32000 H=256", 32000, 256, 768, 4, 4, 4, 2, 256)
        return [small, *_variants(small, short=128)]
    llama = Setup("Llama of Qwen2.5-0.5B's sizes", 151936, 896, 4864, 24, 14, 2, 4, 2048)
    long = [
        llama._replace(name=f"{llama.name}, {tokens // 1024}k tokens", pairs=1, tokens=tokens)
        for tokens in (8192, 32768)
    ]
    return [llama, *_variants(llama, short=256), *long]


def _variants(setup: Setup, short: int) -> list[Setup]:
    """Other shares of prompt, and lengths as people's answers have them: short and ragged."""
    shares = [setup._replace(name=f"{setup.name}, {share:.0%} prompt", prompt=share) for share in (0.25, 0.75)]
    pairs = setup.pairs * setup.tokens // short
    return [*shares, setup._replace(name=f"{setup.name}, ragged", pairs=pairs, tokens=short, ragged=True)]


def measure(
    table: Table, setup: Setup, contestants: Sequence[Contestant], rounds: int, deadline: Deadline = NEVER
) -> None:
    """Trainers take turns by whole runs, in the order ours, TRL's, TRL's, ours; where time is short, ours, TRL's."""
    names = [OURS, *(contestant.name for contestant in contestants if contestant.name == TRL)]
    packages = {TRL: TRL}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = {}
    slowest = 0.0  # seconds of a run
    for order in (names, names[::-1]):
        if order is not names and deadline.left < slowest * len(seconds):
            break
        for name in (each for each in order if each in seconds):
            if order is names:
                deadline.check(slowest)
            begin = time.monotonic()
            result, status = None, "" if name == OURS or installed(name) else "not installed"
            if not status:
                result, status = attempt(partial(train, name, setup, table.device))
            slowest = max(slowest, time.monotonic() - begin)
            if result is not None:
                status = result.wrong
            if result is None or status:
                del seconds[name]
                table.add_status("train_step", setup.name, name, status, packages.get(name, ""))
                continue
            seconds[name] += result.seconds
            peaks[name] = result.peak_mib
    for name, values in seconds.items():
        add = partial(table.add, "train_step", setup.name, name, package=packages.get(name, ""))
        median, low, high = quartiles(values)
        add("time", (1e3 * median, 1e3 * low, 1e3 * high), "ms")
        tokens = setup.batch_tokens
        add("speed", (tokens / median, tokens / high, tokens / low), "tokens/s")
        add("peak memory", (peaks[name],), "MiB")
        if name != OURS and OURS in seconds:
            add(OUR_RATIO, ratio(seconds[OURS], values), "×")


class Run(NamedTuple):
    seconds: list[float]  # of each step after the warm-up, from its predecessor's end to its own
    peak_mib: float  # above model and data
    first_loss: float

    @property
    def wrong(self) -> str:
        """In a few words, if it is: the loss starts at log 2, policy and reference being the same."""
        wrong = abs(self.first_loss - math.log(2)) > 0.01
        return f"wrong: the loss starts at {self.first_loss:.4g}, not at log 2" if wrong else ""


def train(name: str, setup: Setup, device: str) -> Run:
    """A run of the trainer of this name."""
    from transformers import PrinterCallback, TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            self.ends.append(time.perf_counter())

    start_afresh()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(name, setup, device, Path(folder))
        stopwatch = Stopwatch()
        trainer.add_callback(stopwatch)
        trainer.remove_callback(PrinterCallback)
        peak = peak_bytes(trainer.train, device)
    seconds = [end - start for start, end in pairwise(stopwatch.ends[WARM_UP - 1 :])]
    return Run(seconds, peak / 2**20, trainer.state.log_history[0]["loss"])


def _trainer(name: str, setup: Setup, device: str, folder: Path) -> Any:
    """DPO with the reference's log-probs computed beforehand, all options that both have the same."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setup.vocab, hidden_size=setup.hidden_size, intermediate_size=setup.intermediate_size,
        num_hidden_layers=setup.layers, num_attention_heads=setup.heads, num_key_value_heads=setup.kv_heads,
        max_position_embeddings=2 * setup.tokens, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=setup.vocab - 2, pad_token_id=setup.vocab - 1,
    )  # fmt: skip
    options: dict[str, Any] = dict(
        output_dir=str(folder / "run"), per_device_train_batch_size=setup.pairs, max_steps=setup.steps,
        beta=0.1, max_length=None, use_cpu=device == "cpu", bf16=device == "cuda",
        gradient_checkpointing=setup.checkpointing, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, seed=0,
    )  # fmt: skip
    given: dict[str, Any] = dict(
        model=LlamaForCausalLM(config),
        train_dataset=Dataset.from_list(_records(setup)),
        processing_class=_tokenizer(setup.vocab),
    )
    if name == OURS:
        from hdpo_train import HDPOConfig, HDPOTrainer

        return HDPOTrainer(args=HDPOConfig(alpha=1.0, ref_cache_dir=str(folder / "reference"), **options), **given)
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
