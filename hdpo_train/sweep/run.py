"""hdpo-train sweep: one model, several α, several seeds. What does α do, and can temperature alone do it?

    model, pairs ── H-DPO, every α and seed ──> models ── evaluate ──> evaluations ──> sweep.md, sweep.png

    sweep.json                settings, α, seeds
    base/                     the model before training: its evaluation; of the built-in task also model and pairs
    reference/                cached reference log-probs, of all runs
    alpha-0.8/seed-0/         a run: model, metrics.jsonl, report.png, samples.jsonl, evaluation.json

A model's folder has its name once the model is whole (before: *.partial), and an evaluation.json once that is: what is
there is not done again.
"""

import contextlib
import gc
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PrinterCallback

from hdpo_train import quickstart
from hdpo_train.config import HDPOConfig, ScriptArguments
from hdpo_train.evaluation.checkers import Checker
from hdpo_train.evaluation.evaluate import EvalOptions, evaluate
from hdpo_train.evaluation.problems import Problem, load_problems
from hdpo_train.evaluation.scores import Evaluation
from hdpo_train.files import contents_digest, write_whole
from hdpo_train.model.loading import load_model, load_tokenizer
from hdpo_train.options import parse_options
from hdpo_train.processes import Alone
from hdpo_train.run.lock import LOCK_FILE, locked
from hdpo_train.sweep import report as sweep_report
from hdpo_train.sweep.report import Sweep
from hdpo_train.training import make_trainer

SWEEP_FILE, PAIRS_FILE, PROMPTS_FILE = "sweep.json", "pairs.jsonl", "prompts.jsonl"
EVALUATION_FILE, SAMPLES_FILE = "evaluation.json", "samples.jsonl"
ALPHAS = (0.8, 0.9, 1.0, 1.1, 1.2)


class Base(NamedTuple):
    """What the runs of a seed start from."""

    model: str  # a folder or a hub id
    pairs: str  # a file or a hub id
    problems: Sequence[Problem]  # to evaluate on


class Source(Protocol):
    """Where a sweep's model and pairs come from."""

    @property
    def title(self) -> str: ...  # of the report

    @property
    def per_seed(self) -> bool: ...  # a model and pairs for every seed, or one for all

    @property
    def checker(self) -> Checker: ...

    def settings(self) -> dict[str, Any]:
        """Options by name that must be the same when a sweep is resumed."""

    def base(self, folder: Path, seed: int) -> Base:
        """What the seed's runs start from; it is made in the folder if it is not there yet."""


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
        given = {option: getattr(self, name) for name, option in names.items()}
        files = {**given, "checker": self.spec.rpartition(":")[0]}  # file.py:function
        there = {option: Path(name).expanduser() for option, name in files.items() if name}
        contents = {f"contents of {option}": contents_digest(p) for option, p in there.items() if p.exists()}
        return {**given, **contents}

    def base(self, folder: Path, seed: int) -> Base:
        return Base(self.model, self.pairs, self.problems)


@dataclass(frozen=True)
class TaskModel:
    """An SFT model of a built-in task, and pairs of its own answers."""

    task: quickstart.Task
    task_settings: quickstart.Settings
    per_seed: bool
    device: str = "cpu"  # of SFT and of the pairs' samples

    @property
    def title(self) -> str:
        return f"{self.task.TITLE}, evaluated on {self.task_settings.held_out} held-out prompts"

    @property
    def checker(self) -> Checker:
        return lambda problem, completion: self.task.is_right(str(problem.prompt), completion)

    def settings(self) -> dict[str, Any]:
        return {"sft_per_seed": self.per_seed, **{f"task.{k}": v for k, v in asdict(self.task_settings).items()}}

    def base(self, folder: Path, seed: int) -> Base:
        if not folder.exists():
            settings = replace(self.task_settings, seed=seed) if self.per_seed else self.task_settings
            prompts, held_out = self.task.split_prompts(settings.held_out, settings.seed)
            partial = _partial(folder)
            shutil.rmtree(partial, ignore_errors=True)
            model, tokenizer = quickstart.sft(prompts, settings, self.task, self.device)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            pairs = quickstart.make_pairs(model, tokenizer, prompts, settings, self.task)
            for name, records in ((PAIRS_FILE, pairs), (PROMPTS_FILE, [{"prompt": prompt} for prompt in held_out])):
                lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
                (partial / name).write_text("".join(lines), encoding="utf-8")
            os.replace(partial, folder)
        return Base(str(folder), str(folder / PAIRS_FILE), load_problems(str(folder / PROMPTS_FILE)))


@dataclass(frozen=True)
class Plan:
    """What to train and to measure. training: options of `hdpo-train`, as words of its command line.

    Raises ValueError for an α that is not positive, and for no seed.
    """

    alphas: tuple[float, ...] = ALPHAS
    seeds: int = 3
    training: tuple[str, ...] = ()
    evaluation: EvalOptions = field(default_factory=EvalOptions)  # its temperatures: the baseline's; 1 is one of them

    def __post_init__(self) -> None:
        if bad := [alpha for alpha in self.alphas if not 0 < alpha < math.inf]:
            raise ValueError(f"alpha must be a positive number, got {bad[0]:g}")
        if bad := [alpha for alpha in self.alphas if alpha != float(f"{alpha:g}")]:
            raise ValueError(f"alpha must have at most six digits, which name the folders of its runs, got {bad[0]}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")

    def settings(self) -> dict[str, Any]:
        """What must be the same in all runs: training options that are not the default, and all of the evaluation."""
        script, args = parse_options([*self.training, "--output_dir", "sweep"])
        if args.alpha_schedule != "constant" or args.target_entropy is not None:
            raise ValueError("a sweep compares runs of constant alpha: leave out alpha_schedule and target_entropy")
        chosen: dict[str, Any] = {}
        for given, default in ((script, ScriptArguments()), (args, HDPOConfig(output_dir="sweep"))):
            values = ((each.name, getattr(given, each.name)) for each in fields(given))
            chosen |= {name: value for name, value in values if value != getattr(default, name)}
        evaluation = asdict(self.evaluation)
        del evaluation["seed"]  # that of the run
        return {**chosen, **evaluation}


def sweep(folder: Path, source: Source, plan: Plan, process: Alone | None = None) -> Sweep:
    """All runs that are not in the folder yet, and the report of all that are. α = 1 is always among them.

    process: one of several that all call this, and take runs from each other; process 0 writes the report.

    Raises ValueError, naming the options, if the folder holds a sweep of other settings, FileExistsError if it holds
    something else or another sweep has it, and FloatingPointError, naming the run, if one diverges.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a run of a sweep is of one process: call hdpo_train.processes.alone first, and pass it on")
    process = process or Alone()
    with contextlib.ExitStack() as held:

        def begin() -> Plan:
            if not held.enter_context(locked(folder)) and process.of > 1:
                raise ValueError(f"{folder} cannot be locked, so that processes would do the same: start one only")
            return _claim(folder, source, plan)

        return _sweep(folder, source, process.told_by_first(begin), process)


def _sweep(folder: Path, source: Source, plan: Plan, process: Alone) -> Sweep:
    models: list[tuple[float | None, int]] = []  # (α, seed); without α: the model before training
    for seed in range(plan.seeds):
        models += [(None, seed)] if source.per_seed or seed == 0 else []
        models += [(alpha, seed) for alpha in plan.alphas]
    jobs = [_Job(alpha, seed, folder, source, plan) for alpha, seed in models]
    done = [each for each in jobs if each.is_done]
    for each in done:
        each.evaluation()  # a file that is damaged is refused before hours of training
    durations: list[float] = []  # of those that this process has done
    while left := [each for each in jobs if not each.is_done]:
        with contextlib.ExitStack() as held:
            job = next((each for each in left if each.take(held)), None)
            if job is None:
                time.sleep(0.5)  # others are at work. One that dies loses its lock, and its run is taken here
                continue
            number = f"{jobs.index(job) + 1} of {len(jobs)}"
            time_left = statistics.fmean(durations) * math.ceil(len(left) / process.of) if durations else None
            about = f"; about {_duration(time_left)} left" if time_left is not None else ""
            print(f"{number}: {job.name}{about}", flush=True)
            started = time.perf_counter()
            try:
                job.run()
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted in {number}, {job.name}; what is finished stays, and the same command goes on from "
                    "there"
                ) from None
            durations.append(time.perf_counter() - started)
    base = [each.evaluation() for each in jobs if each.alpha is None]
    runs = {alpha: [each.evaluation() for each in jobs if each.alpha == alpha] for alpha in plan.alphas}
    result = Sweep(source.title, source.per_seed, base, runs)
    if process.number == 0:
        print(f"{len(jobs)} models evaluated, {len(done)} of them before")
        sweep_report.write(result, folder)
    return result


@dataclass(frozen=True)
class _Job:
    """A model to be made and evaluated: of an α and a seed, or without α the one before training."""

    alpha: float | None
    seed: int
    sweep: Path
    source: Source
    plan: Plan

    @property
    def name(self) -> str:
        name = "before training" if self.alpha is None else f"α = {self.alpha:g}"
        return name if self.alpha is None and not self.source.per_seed else f"{name}, seed {self.seed}"

    @property
    def base_folder(self) -> Path:
        return self.sweep / "base" / f"seed-{self.seed}" if self.source.per_seed else self.sweep / "base"

    @property
    def folder(self) -> Path:
        return self.base_folder if self.alpha is None else self.sweep / f"alpha-{self.alpha:g}" / f"seed-{self.seed}"

    @property
    def is_done(self) -> bool:
        return (self.folder / EVALUATION_FILE).exists()

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self.plan.evaluation.temperatures if self.alpha == 1 else (1.0,)

    def take(self, held: contextlib.ExitStack) -> bool:
        """Whether this process can do the job, which it then has until the stack ends."""
        if self.alpha is not None and not self.base_folder.exists():  # another process makes what it starts from
            return False
        try:
            held.enter_context(locked(self.sweep, "-".join(self.folder.relative_to(self.sweep).parts)))
        except FileExistsError:
            return False
        return not self.is_done

    def evaluation(self) -> Evaluation:
        """The evaluation, once it is finished. Raises ValueError for a damaged file."""
        path = self.folder / EVALUATION_FILE
        evaluation = Evaluation.load(path)
        if {0.0, *evaluation.sampled} != {0.0, *self.temperatures} or evaluation.greedy is None:
            raise ValueError(
                f"{path} is not of this sweep's temperatures: delete it, and the same command writes it again"
            )
        return evaluation

    def run(self) -> None:
        base = self.source.base(self.base_folder, self.seed)
        if self.alpha is not None and not self.folder.exists():
            self._train(base, self.alpha)
        self._evaluate(base)
        gc.collect()  # trainers are in cycles, which hold their models
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _train(self, base: Base, alpha: float) -> None:
        """As `hdpo-train` with these options; one that was killed goes on from its last checkpoint, if it wrote any."""
        partial = _partial(self.folder)
        started_before = partial.exists()
        options = {
            "model_name_or_path": base.model,
            "dataset_name": base.pairs,
            "alpha": alpha,
            "seed": self.seed,
            "output_dir": partial,
            "ref_cache_dir": self.sweep / "reference",
            "disable_tqdm": True,
            "overwrite_output_dir": True,
        }
        try:
            trainer = make_trainer(*parse_options([*self.plan.training, *words(options)]))
            trainer.remove_callback(PrinterCallback)  # metrics.jsonl has every log line
            trainer.train(resume_from_checkpoint=started_before)
            trainer.save_model()
        except FloatingPointError as error:
            raise FloatingPointError(f"{self.name}: {error}") from error
        os.replace(partial, self.folder)

    def _evaluate(self, base: Base) -> None:
        plan, name = self.plan, base.model if self.alpha is None else str(self.folder)
        script, args = parse_options([*plan.training, "--output_dir", str(self.folder)])
        remote_code = {"trust_remote_code": script.trust_remote_code}
        model: Any = load_model(name, {"dtype": script.dtype, **remote_code})
        model.to(args.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        evaluation = evaluate(
            model,
            load_tokenizer(name, **remote_code),
            base.problems,
            self.source.checker,
            replace(plan.evaluation, temperatures=self.temperatures, seed=self.seed),
            name=self.name,
            samples_file=self.folder / SAMPLES_FILE,
        )
        if line := evaluation.faults():
            print(f"{self.name}: {line}")
        partial = _partial(self.folder / EVALUATION_FILE)
        evaluation.save(partial)
        os.replace(partial, self.folder / EVALUATION_FILE)


def _claim(folder: Path, source: Source, plan: Plan) -> Plan:
    """The plan, with the α and seeds that the folder's sweep has already."""
    temperatures = tuple(sorted({1.0, *plan.evaluation.temperatures}))
    plan = replace(plan, evaluation=replace(plan.evaluation, temperatures=temperatures))
    settings = json.loads(json.dumps({**source.settings(), **plan.settings()}, default=str))
    path = folder / SWEEP_FILE
    if path.exists():
        found = _read_sweep(path)
        different = []
        for name in sorted(settings | found["settings"]):
            before, now = (each.get(name, "the default") for each in (found["settings"], settings))
            if before != now:
                different.append(f"{name} = {before}, this call has {name} = {now}")
        if different:
            raise ValueError(
                f"{folder} holds a sweep with {'; '.join(different)}: give that as it was, or choose another "
                "--output_dir for a sweep of its own"
            )
        plan = replace(plan, alphas=(*plan.alphas, *found["alphas"]), seeds=max(plan.seeds, found["seeds"]))
    elif any(found.name != LOCK_FILE for found in folder.iterdir()):
        raise FileExistsError(f"{folder} holds something that is not a sweep: choose another --output_dir")
    plan = replace(plan, alphas=tuple(sorted({1.0, *plan.alphas})))
    text = json.dumps({"alphas": plan.alphas, "seeds": plan.seeds, "settings": settings}, indent=2, ensure_ascii=False)
    write_whole(path, text + "\n")
    return plan


def _read_sweep(path: Path) -> dict[str, Any]:
    """alphas, seeds and settings of a sweep's file. Raises ValueError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            "alphas": [float(alpha) for alpha in found["alphas"]],
            "seeds": int(found["seeds"]),
            "settings": dict(found["settings"]),
        }
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}), and nothing else says what its runs have in common: choose another "
            "--output_dir"
        ) from error


def words(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
