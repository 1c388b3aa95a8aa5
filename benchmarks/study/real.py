"""What α does to a real pretrained model, SmolLM2-135M-Instruct, on short instructions that a program checks.

    prompts ── own answers, judged ──> pairs of a seed ── each condition's run ──> rows after 1 and 3 epochs ──> report

A seed has its own prompts, own pairs, own held-out prompts (with other kinds of constraints) and own order. The
learning rate is constant: what three epochs' run is after its first epoch is the run of one epoch. Each finished run is
a file of rows in .real/study; a command that was stopped begins again with the run that it was in. Runs that stand
first in CONDITIONS are done first, for all seeds; --seeds shares them out among processes.

Held-out answers, and those that pairs are made of, are drawn from the weights rounded to bf16.

The settings were tried on seed 99, which is not reported: DPO and α = 1.4 learn something in the first epoch there.

Not compared: min-p and top-p at equal entropy (the sampler has neither), DPO stopped at equal KL, --target_entropy.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from benchmarks.study import instructions as task
from hdpo_train import HDPOConfig, HDPOTrainer
from hdpo_train.evaluation.evaluate import EvalOptions, grade
from hdpo_train.evaluation.pairs import draw_pairs, judge_samples
from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.sampler import Sampler, SamplingOptions
from hdpo_train.evaluation.samples import digest
from hdpo_train.files import write_whole
from hdpo_train.model.loading import load_model, load_tokenizer

SEEDS = (0, 1, 2, 3, 4)
TEMPERATURES = (0.7, 1.3)  # of DPO after its last epoch, beside 1
BEFORE = "before training"


@dataclass(frozen=True)
class Settings:
    pair_prompts: int = 100
    pair_samples: int = 8
    held_out: int = 30
    samples: int = 4
    batch: int = 8  # pairs of a step
    learning_rate: float = 2e-5
    beta: float = 0.1
    epochs: int = 3
    max_new_tokens: int = task.MAX_NEW_TOKENS


class Condition(NamedTuple):
    """A way to train, or (α = 0) not to."""

    alpha: float
    level: str = "sequence"
    beta: float = 1.0  # times the settings' β
    matched: bool = False  # pairs matched in length

    @property
    def name(self) -> str:
        if not self.alpha:
            return BEFORE
        parts = ["DPO" if self.alpha == 1 else f"α = {self.alpha:g} by {self.level}"]
        parts += [f"β × {self.beta:g}"] if self.beta != 1 else []
        return ", ".join(parts + ["matched lengths"] * self.matched)


UNTRAINED, DPO = Condition(0), Condition(1)
ALPHAS = (0.7, 1.4)
CORE = [Condition(alpha, level) for level in ("sequence", "token") for alpha in ALPHAS]
EQUAL_BETA = {Condition(alpha): Condition(1, beta=alpha) for alpha in ALPHAS}  # DPO with β′ = αβ
MATCHED = [Condition(alpha, matched=True) for alpha in (1, *ALPHAS)]
CONDITIONS = [DPO, *CORE, UNTRAINED, *EQUAL_BETA.values(), *MATCHED]
GRID = [Condition(alpha, beta=beta) for beta in (0.3, 3.0) for alpha in (0.7, 1, 1.4)]  # first seed only; β × 1 is CORE
METRICS = ("greedy accuracy", "sampled accuracy", "pass@k", "distinct right", "entropy", "words")
Row = dict[str, Any]


class Study:
    """The runs of these settings with one model; their files are in a folder of their own."""

    def __init__(self, model: Path, work: Path, settings: Settings) -> None:
        self.model, self.settings = str(model), settings
        asked = [kind.says for kind in task.KINDS.values()]
        self.folder = work / digest([asdict(settings), model.name, TEMPERATURES, asked])
        self.tokenizer: Any = load_tokenizer(self.model)
        self.sampled_from: Any = load_model(self.model, {"dtype": torch.bfloat16})

    def run(self, seeds: Sequence[int]) -> None:
        """What of these seeds is not there yet."""
        wanted = [(each, seed) for each in CONDITIONS for seed in seeds]
        wanted += [(each, seed) for each in GRID for seed in seeds if seed == SEEDS[0]]
        for condition, seed in wanted:
            path = self.folder / f"{condition.name}, seed {seed}.json"
            if not path.exists():
                print(f"… {path.stem}", flush=True)
                rows = self.rows_of(condition, seed)
                write_whole(path, json.dumps(rows, ensure_ascii=False))

    def rows(self) -> list[Row]:
        """Of all runs that are there."""
        return [row for path in sorted(self.folder.glob("*, seed *.json")) for row in json.loads(path.read_text())]

    def rows_of(self, condition: Condition, seed: int) -> list[Row]:
        """Train and evaluate; one row for each evaluation."""
        if condition == UNTRAINED:
            self.sampled_from.load_state_dict(load_model(self.model).state_dict())
            return self._evaluate(condition, seed, epoch=0)
        records = self.pairs(seed, condition.matched)
        found: list[Row] = []
        model = load_model(self.model)
        args = HDPOConfig(
            output_dir=str(self.folder / f"run {condition.name}, seed {seed}"),
            ref_cache_dir=str(self.folder / "reference"),
            alpha=condition.alpha,
            alpha_level=condition.level,
            beta=condition.beta * self.settings.beta,
            seed=seed,
            num_train_epochs=self.settings.epochs,
            per_device_train_batch_size=self.settings.batch,
            learning_rate=self.settings.learning_rate,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=True,
            save_strategy="no",
            disable_tqdm=True,
            overwrite_output_dir=True,
        )
        study = self

        class AfterEpoch(TrainerCallback):
            def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                epoch, last = round(state.epoch), study.settings.epochs
                if epoch in (1, last) or condition == DPO:
                    study.sampled_from.load_state_dict(model.state_dict())
                    temperatures = TEMPERATURES if condition == DPO and epoch == last else ()
                    about = {"margin": trainer.start["initial_margin"], "pairs": len(records)}
                    found.extend(study._evaluate(condition, seed, epoch, temperatures, about))

        data = Dataset.from_list(records)
        trainer = HDPOTrainer(
            model, args=args, train_dataset=data, processing_class=self.tokenizer, callbacks=[AfterEpoch()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return found

    def pairs(self, seed: int, matched: bool) -> list[dict[str, Any]]:
        """Of the model's own answers, which are drawn once; matched: right and wrong ones of about the same length."""
        settings, path = self.settings, self.folder / f"samples of seed {seed}.jsonl"
        problems = task.problems(task.TRAINING_KINDS, settings.pair_prompts, seed)
        options = SamplingOptions(settings.pair_samples, (1.0,), settings.max_new_tokens, 160, seed)
        sampler = Sampler(problems, self.tokenizer, options, entropy=False)
        sampler.keep_in(path, Path(self.model).name)
        if sampler.missing:
            self.sampled_from.load_state_dict(load_model(self.model).state_dict())
        judged = judge_samples(problems, task.is_right, sampler.run(self.sampled_from), "pairs")
        pairs = draw_pairs(judged.right, 2, seed, judged.lengths if matched else None)
        return [_record(problems[number], *answers) for number, *answers in pairs]

    def _evaluate(
        self, condition: Condition, seed: int, epoch: int, temperatures: Sequence[float] = (), about: Row | None = None
    ) -> list[Row]:
        settings = self.settings
        problems = task.problems(task.EVALUATION_KINDS, settings.held_out, seed)
        options = EvalOptions(
            settings.samples, (1.0, *temperatures), settings.max_new_tokens, 160, seed,
            k=(settings.samples,), self_bleu=False,
        )  # fmt: skip
        samples = Sampler(problems, self.tokenizer, options.sampling, name=condition.name).run(self.sampled_from)
        evaluation = grade(condition.name, problems, task.is_right, samples, options)
        assert evaluation.greedy is not None
        rows = []
        for temperature, scores in evaluation.sampled.items():
            assert scores.entropy is not None
            said = [len(sample.completion.split()) for sample in samples if sample.temperature == temperature]
            figures = (
                evaluation.greedy.accuracy.value, scores.accuracy.value, scores.pass_at[settings.samples].value,
                scores.distinct_right.value, scores.entropy.value, sum(said) / len(said),
            )  # fmt: skip
            where = {"seed": seed, "condition": condition.name, **condition._asdict(), "epoch": epoch}
            where["beta"] = condition.beta * settings.beta
            where |= {"temperature": temperature, "margin": None, "pairs": None, **(about or {})}
            rows.append(where | dict(zip(METRICS, figures, strict=True)))
        return rows


def _record(problem: Problem, *answers: str) -> dict[str, Any]:
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
    return {"prompt": problem.prompt, "chosen": chosen, "rejected": rejected}


def write_rows(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
