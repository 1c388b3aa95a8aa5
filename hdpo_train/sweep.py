"""hdpo-train sweep: one model, several α, several seeds. What does α do, and can temperature alone do it?

    model, pairs ── H-DPO, every α and seed ──> models ── evaluate ──> evaluations ──> sweep.md, sweep.png

    sweep.json                settings, α, seeds
    base/                     the model before training: its evaluation; of the built-in task also model and pairs
    reference/                cached reference log-probs, of all runs
    alpha-0.8/seed-0/         a run: model, metrics.jsonl, report.png, samples.jsonl, evaluation.json

A model's folder has its name once the model is whole (before: *.partial), and an evaluation.json once that is: what is
there is not done again.
"""

import argparse
import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PrinterCallback
from transformers.utils import logging

from hdpo_train import quickstart, sweep_report
from hdpo_train.checkers import Checker, Problem, make_checker
from hdpo_train.config import HDPOConfig, ScriptArguments
from hdpo_train.evaluate import EvalOptions, evaluate
from hdpo_train.scores import Evaluation
from hdpo_train.sweep_report import Sweep
from hdpo_train.trainer import load_model, load_tokenizer

SWEEP_FILE, EVALUATION_FILE, SAMPLES_FILE = "sweep.json", "evaluation.json", "samples.jsonl"
ALPHAS = (0.8, 0.9, 1.0, 1.1, 1.2)
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3)  # of the baseline, beside 1


class Base(NamedTuple):
    """What the runs of a seed start from."""

    model: str  # a folder or a hub id
    pairs: str  # a file or a hub id
    problems: Sequence[Problem]  # to evaluate on


class Source(Protocol):
    """Where a sweep's model and pairs come from."""

    title: str  # of the report
    checker: Checker
    per_seed: bool  # a model and pairs for every seed, or one for all

    def settings(self) -> dict[str, Any]:
        """Option -> value: what a sweep that is gone on with must have in common."""

    def base(self, folder: Path, seed: int) -> Base:
        """Made in the folder if it is not there yet."""


@dataclass(frozen=True)
class OwnModel:
    """A model and pairs that exist."""

    model: str
    pairs: str
    prompts: str
    spec: str  # of the checker
    checker: Checker
    problems: Sequence[Problem]
    per_seed: bool = False

    @property
    def title(self) -> str:
        return f"{self.model} on {self.pairs}, evaluated on the {len(self.problems)} prompts of {self.prompts}"

    def settings(self) -> dict[str, Any]:
        names = {"model": "model_name_or_path", "pairs": "dataset_name", "prompts": "prompts", "spec": "checker"}
        return {option: getattr(self, name) for name, option in names.items()}

    def base(self, folder: Path, seed: int) -> Base:
        return Base(self.model, self.pairs, self.problems)


@dataclass(frozen=True)
class TaskModel:
    """An SFT model of a built-in task, and pairs of its own answers."""

    task: quickstart.Task
    task_settings: quickstart.Settings
    per_seed: bool

    @property
    def title(self) -> str:
        return f"{self.task.TITLE}, evaluated on {self.task_settings.held_out} held-out prompts"

    def checker(self, problem: Problem, completion: str) -> bool:
        return self.task.is_right(str(problem.prompt), completion)

    def settings(self) -> dict[str, Any]:
        return {"sft_per_seed": self.per_seed, **{f"task.{k}": v for k, v in asdict(self.task_settings).items()}}

    def base(self, folder: Path, seed: int) -> Base:
        settings = replace(self.task_settings, seed=seed) if self.per_seed else self.task_settings
        prompts, held_out = self.task.split_prompts(settings.held_out, settings.seed)
        if not folder.exists():
            partial = _partial(folder)
            shutil.rmtree(partial, ignore_errors=True)
            model, tokenizer = quickstart.sft(prompts, settings, self.task)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            lines = [json.dumps(x) + "\n" for x in quickstart.make_pairs(model, tokenizer, prompts, settings, self.task)]
            (partial / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
            os.replace(partial, folder)
        return Base(str(folder), str(folder / "pairs.jsonl"), [Problem(prompt, {}) for prompt in held_out])


@dataclass(frozen=True)
class Plan:
    """What to train and to measure. training: options of `hdpo-train`, as words of its command line."""

    alphas: tuple[float, ...] = ALPHAS
    seeds: int = 3
    training: tuple[str, ...] = ()
    evaluation: EvalOptions = EvalOptions()  # its temperatures are those of the baseline; 1 is always among them

    def settings(self) -> dict[str, Any]:
        """What must be the same in all runs: training options that are not the default, and all of the evaluation."""
        script, args = _parse([*self.training, "--output_dir", "sweep"])
        chosen: dict[str, Any] = {}
        for given, default in ((script, ScriptArguments()), (args, HDPOConfig(output_dir="sweep"))):
            values = ((field.name, getattr(given, field.name)) for field in fields(given))
            chosen |= {name: value for name, value in values if value != getattr(default, name)}
        evaluation = asdict(self.evaluation)
        del evaluation["seed"]  # that of the run
        return {**chosen, **evaluation}


def sweep(folder: Path, source: Source, plan: Plan) -> Sweep:
    """All runs that are not in the folder yet, and the report of all that are. α = 1 is always among them.

    Raises ValueError, naming the option, if the folder holds a sweep of other settings, and FileExistsError if it holds
    something else.
    """
    plan = _claim(folder, source, plan)
    jobs: list[tuple[float | None, int]] = []  # (α, seed); without α: the model before training
    for seed in range(plan.seeds):
        jobs += [(None, seed)] if source.per_seed or seed == 0 else []
        jobs += [(alpha, seed) for alpha in plan.alphas]
    base: list[Evaluation] = []
    runs: dict[float, list[Evaluation]] = {alpha: [] for alpha in plan.alphas}
    durations: list[float] = []  # of those that were not there
    for number, (alpha, seed) in enumerate(jobs, 1):
        name = "before training" if alpha is None else f"α = {alpha:g}"
        print(f"{number} of {len(jobs)}: {name}, seed {seed} … ", end="", flush=True)
        started = time.perf_counter()
        evaluation, done = _job(folder, source, plan, alpha, seed, name)
        (base if alpha is None else runs[alpha]).append(evaluation)
        if done:
            durations.append(time.perf_counter() - started)
            left = (len(jobs) - number) * sum(durations) / len(durations)
            print(f"{', '.join(done)}; about {_duration(left)} left", flush=True)
        else:
            print("there already", flush=True)
        gc.collect()  # trainers are in cycles, which hold their models
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    result = Sweep(source.title, source.per_seed, base, runs)
    sweep_report.write(result, folder)
    return result


def _job(
    folder: Path, source: Source, plan: Plan, alpha: float | None, seed: int, name: str
) -> tuple[Evaluation, list[str]]:
    """The evaluation of a run, and what had to be done for it."""
    done: list[str] = []

    def timed(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        done.append(f"{what} {_duration(time.perf_counter() - started)}")
        return result

    base_folder = folder / "base" / f"seed-{seed}" if source.per_seed else folder / "base"
    run = base_folder if alpha is None else folder / f"alpha-{alpha:g}" / f"seed-{seed}"
    if (run / EVALUATION_FILE).exists():
        return Evaluation.load(run / EVALUATION_FILE), []
    base = timed("prepared", source.base, base_folder, seed) if alpha is None else source.base(base_folder, seed)
    if alpha is not None and not run.exists():
        timed("trained", _train, run, folder / "reference", base, plan, alpha, seed)
    temperatures = plan.evaluation.temperatures if alpha == 1 else (1.0,)
    options = replace(plan.evaluation, temperatures=temperatures, seed=seed)
    model = base.model if alpha is None else str(run)
    evaluation = timed("evaluated", _evaluate, run, model, base.problems, source.checker, plan, options, name)
    return evaluation, done


def _train(run: Path, reference: Path, base: Base, plan: Plan, alpha: float, seed: int) -> None:
    """As `hdpo-train` with these options; one that was killed goes on from its last checkpoint, if it wrote any."""
    from hdpo_train.__main__ import make_trainer

    partial = _partial(run)
    options = {
        "model_name_or_path": base.model, "dataset_name": base.pairs, "alpha": alpha, "seed": seed,
        "output_dir": partial, "ref_cache_dir": reference, "disable_tqdm": True, "overwrite_output_dir": True,
    }  # fmt: skip
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    script, args = _parse([*plan.training, *words])
    try:
        trainer = make_trainer(script, args)
        trainer.remove_callback(PrinterCallback)  # metrics.jsonl has every log line
        trainer.train(resume_from_checkpoint=partial.exists() or None)
        trainer.save_model()
    except FloatingPointError as error:
        raise FloatingPointError(f"α = {alpha:g}, seed {seed}: {error}") from error
    os.replace(partial, run)


def _evaluate(
    run: Path, name: str, problems: Sequence[Problem], checker: Checker, plan: Plan, options: EvalOptions, title: str
) -> Evaluation:
    script, args = _parse([*plan.training, "--output_dir", str(run)])
    remote_code = {"trust_remote_code": script.trust_remote_code}
    model: Any = load_model(name, {"dtype": script.dtype, **remote_code}).to(args.device)
    tokenizer = load_tokenizer(name, **remote_code)
    run.mkdir(parents=True, exist_ok=True)
    evaluation = evaluate(
        model, tokenizer, problems, checker, options, name=title, samples_file=run / SAMPLES_FILE
    )  # fmt: skip
    partial = _partial(run / EVALUATION_FILE)
    evaluation.save(partial)
    os.replace(partial, run / EVALUATION_FILE)
    return evaluation


def _claim(folder: Path, source: Source, plan: Plan) -> Plan:
    """The plan, with the α and seeds that the folder's sweep has already."""
    temperatures = tuple(sorted({1.0, *plan.evaluation.temperatures}))
    plan = replace(plan, evaluation=replace(plan.evaluation, temperatures=temperatures))
    settings = json.loads(json.dumps({**source.settings(), **plan.settings()}, default=str))
    path = folder / SWEEP_FILE
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        for name in sorted(settings | found["settings"]):
            before, now = (each.get(name, "the default") for each in (found["settings"], settings))
            if before != now:
                raise ValueError(
                    f"{folder} holds a sweep with {name} = {before}, this call has {name} = {now}: give {name} as it "
                    "was, or choose another --output_dir"
                )
        plan = replace(plan, alphas=(*plan.alphas, *found["alphas"]), seeds=max(plan.seeds, found["seeds"]))
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something that is not a sweep: choose another --output_dir")
    plan = replace(plan, alphas=tuple(sorted({1.0, *plan.alphas})))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"alphas": plan.alphas, "seeds": plan.seeds, "settings": settings}, indent=2, ensure_ascii=False)
    _partial(path).write_text(text + "\n", encoding="utf-8")
    os.replace(_partial(path), path)
    return plan


def _parse(words: Sequence[str]) -> tuple[ScriptArguments, HDPOConfig]:
    from hdpo_train.__main__ import parse_options  # which imports this module in its turn

    return parse_options(list(words))


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
