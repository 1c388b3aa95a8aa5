"""`hdpo-train quickstart`, all of the project on one page: a task, a small model, pairs made from it, H-DPO, a table.

demonstrations ── SFT ──> model ── sample, judge ──> pairs ── H-DPO, α = 1, α < 1 ──> models ── evaluate ──> table
"""

import copy
import functools
import json
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from hdpo_train.config import HDPOConfig
from hdpo_train.evaluation.evaluate import EvalOptions, evaluate
from hdpo_train.evaluation.pairs import draw_pairs
from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.report import drawn
from hdpo_train.evaluation.sampler import SamplingOptions, answers
from hdpo_train.evaluation.scores import Evaluation
from hdpo_train.markdown import table
from hdpo_train.quickstart import task
from hdpo_train.quickstart.model import new_model, teach, train_tokenizer
from hdpo_train.quickstart.picture import draw
from hdpo_train.trainer import HDPOTrainer

SETTINGS_FILE, RESULTS_FILE, TABLE_FILE, PICTURE_FILE = "settings.json", "results.json", "results.md", "alpha.png"
BATCH_SIZE = 1024  # samples at a time
K = 8  # of pass@k


class Task(Protocol):
    """Prompts with answers that a program can make and check: the module `hdpo_train.quickstart.task`, or another."""

    TITLE: str
    MAX_NEW_TOKENS: int  # that a right answer and its end may take
    MAX_LENGTH: int  # tokens of prompt and answer

    def split_prompts(self, num_held_out: int, seed: int) -> tuple[list[str], list[str]]: ...  # training, held-out
    def demonstrate(self, prompt: str, rng: random.Random) -> str: ...
    def is_right(self, prompt: str, answer: str) -> bool: ...


@dataclass
class Settings:
    """Sizes that take about a minute on two CPU cores."""

    seed: int = 0
    alpha: float = 0.7  # beside α = 1
    beta: float = 2.0
    hidden_size: int = 96
    num_layers: int = 2
    vocab_size: int = 320
    sft_steps: int = 220
    sft_batch_size: int = 128
    sft_learning_rate: float = 3e-3
    pair_prompts: int = 4000
    samples_per_prompt: int = 8
    pairs_per_prompt: int = 2
    learning_rate: float = 1e-4
    batch_size: int = 64
    epochs: int = 2
    held_out: int = 300
    eval_samples: int = 16


def run(folder: Path, settings: Settings) -> dict[str, Evaluation]:
    """The whole story. Leaves models, pairs.jsonl, plots, results.json and results.md in `folder`; prints the table.

    A folder that holds an earlier quickstart is replaced; one that holds anything else is refused (FileExistsError).
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.perf_counter()
    _claim(folder, settings)
    prompts, held_out = task.split_prompts(settings.held_out, settings.seed)
    example = held_out[0]
    answer = task.demonstrate(example, random.Random(settings.seed)).strip()
    print(task.EXPLANATION.format(prompt=example, count=task.count_right(example), answer=answer))

    with stage(f"1/5 SFT: a model learns from {settings.sft_steps * settings.sft_batch_size} demonstrations"):
        model, tokenizer = sft(prompts, settings)
        _save(model, tokenizer, folder / "sft")
    with stage(f"2/5 pairs: it answers {settings.pair_prompts} prompts, a program judges") as note:
        records = make_pairs(model, tokenizer, prompts, settings)
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
        note(f"{len(records)} pairs")
    models, runs = {"SFT (before)": model}, {}
    for number, alpha in ((3, 1.0), (4, settings.alpha)):
        with stage(f"{number}/5 H-DPO, α = {alpha:g}") as note:
            name = f"H-DPO, α = {alpha:g}" + (" (DPO)" if alpha == 1 else "")
            models[name], runs[name] = copy.deepcopy(model), folder / f"alpha-{alpha:g}"
            trainer = train(models[name], tokenizer, records, runs[name], settings, alpha=alpha)
            note(f"{trainer.state.global_step} steps, margin before training {trainer.start['initial_margin']:+.2f}")
    with stage(f"5/5 evaluation: {len(held_out)} held-out prompts, {settings.eval_samples} samples each"):
        results = {name: measure(model, tokenizer, held_out, settings, name) for name, model in models.items()}

    table = _table(results)
    (folder / TABLE_FILE).write_text(table + "\n", encoding="utf-8")
    text = json.dumps([asdict(result) for result in results.values()], indent=2, ensure_ascii=False)
    (folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
    picture = folder / PICTURE_FILE
    shown = f"; {picture} shows what α did" * drawn(functools.partial(draw, runs), results, picture)
    print(
        f"\n{table}\n\n{time.perf_counter() - started:.0f} s in all{shown}; models, pairs, plots and results: {folder}/"
    )
    return results


def sft(
    prompts: list[str], settings: Settings, task: Task = task, device: str = "cpu"
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    rng = random.Random(settings.seed)
    tokenizer = train_tokenizer([prompt + task.demonstrate(prompt, rng) for prompt in prompts], settings.vocab_size)
    model = new_model(tokenizer, settings.hidden_size, settings.num_layers, task.MAX_LENGTH, settings.seed)
    model.to(device)  # type: ignore[arg-type]
    teach(
        model,
        tokenizer,
        prompts,
        task.demonstrate,
        steps=settings.sft_steps,
        batch_size=settings.sft_batch_size,
        learning_rate=settings.sft_learning_rate,
        seed=settings.seed,
    )
    return model, tokenizer


def make_pairs(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    settings: Settings,
    task: Task = task,
) -> list[dict[str, str]]:
    asked = prompts[: settings.pair_prompts]
    options = SamplingOptions(
        settings.samples_per_prompt, max_new_tokens=task.MAX_NEW_TOKENS, batch_size=BATCH_SIZE, seed=settings.seed
    )
    drawn = answers(model, tokenizer, asked, options)
    right = [
        {answer: task.is_right(prompt, answer) for answer in answers_to if answer}
        for prompt, answers_to in zip(asked, drawn, strict=True)
    ]
    pairs = draw_pairs(right, settings.pairs_per_prompt, settings.seed)
    if not pairs:
        raise ValueError("the model gave no prompt both a right and a wrong answer: there is nothing to prefer")
    return [{"prompt": asked[each.prompt], "chosen": each.chosen, "rejected": each.rejected} for each in pairs]


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: list[dict[str, str]],
    folder: Path,
    settings: Settings,
    **options: Any,
) -> HDPOTrainer:
    """H-DPO of `model` itself; options: of HDPOConfig, beside those of the settings."""
    args = HDPOConfig(
        **training_options(settings),
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        disable_tqdm=False,
        seed=settings.seed,
        ref_cache_dir=str(folder.parent / "reference"),
        **options,
    )
    trainer = HDPOTrainer(model, args=args, train_dataset=Dataset.from_list(records), processing_class=tokenizer)
    trainer.pop_callback(ProgressCallback)
    trainer.add_callback(_BarOnly())
    trainer.train()
    trainer.save_model()
    return trainer


def training_options(settings: Settings) -> dict[str, Any]:
    """Options of `hdpo-train` for this task, whatever the device."""
    return {
        "beta": settings.beta,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch_size,
        "num_train_epochs": settings.epochs,
        "warmup_steps": 5,
        "logging_steps": 5,
        "save_strategy": "no",
    }


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: list[str],
    settings: Settings,
    name: str = "the model",
) -> Evaluation:
    options = EvalOptions(
        settings.eval_samples,
        max_new_tokens=task.MAX_NEW_TOKENS,
        batch_size=BATCH_SIZE,
        seed=settings.seed,
        k=(K,),
        self_bleu=False,
    )
    problems = [Problem(prompt, {}) for prompt in held_out]
    return evaluate(model, tokenizer, problems, _is_right, options, name=name)


def _is_right(problem: Problem, completion: str) -> bool:
    return task.is_right(str(problem.prompt), completion)


class _BarOnly(ProgressCallback):
    """The progress bar without a printed line per log: metrics.jsonl has them."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


def _table(results: dict[str, Evaluation]) -> str:
    rows = []
    for name, result in results.items():
        greedy, sampled = result.greedy, result.sampled[1.0]
        assert greedy is not None and sampled.entropy is not None
        shares = (greedy.accuracy, sampled.accuracy, sampled.pass_at[K])
        distinct = f"{sampled.distinct_right.value:.1f} of {sampled.num_samples}"
        rows.append([name, *(f"{share.value:.1%}" for share in shares), distinct, f"{sampled.entropy.value:.3f}"])
    columns = ("greedy accuracy", "sampled accuracy", f"pass@{K}", "distinct right answers", "entropy, nats per token")
    return table(["", *columns], rows)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _claim(folder: Path, settings: Settings) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / SETTINGS_FILE).exists():
            raise FileExistsError(f"{folder} holds something that is not a quickstart: choose another --output_dir")
        print(f"(replacing the earlier quickstart in {folder}/)")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


@contextmanager
def stage(title: str) -> Iterator[Any]:
    notes: list[str] = []
    print(f"{title} …", flush=True)
    start = time.perf_counter()
    yield notes.append
    print("    " + ", ".join([*notes, f"{time.perf_counter() - start:.0f} s"]), flush=True)
