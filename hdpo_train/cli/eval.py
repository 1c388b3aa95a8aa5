"""hdpo-train eval: models, or ready-made samples, on a file of prompts whose answers a checker knows.

prompts ── problems ─┬─ model ── Sampler ──> samples-<name>.jsonl ─┬─ grade ──> results.json, results.md, results.png
                     └─ --samples FILE ────────────────────────────┘
"""

import argparse
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from transformers.utils import logging

from hdpo_train.cli.judging import (
    add_problem_options,
    add_sampling_options,
    load_judged_problems,
    make_sampler,
    samples_of,
)
from hdpo_train.evaluation.evaluate import DEFAULT_K, EvalOptions, grade
from hdpo_train.evaluation.report import draw, drawn, markdown
from hdpo_train.evaluation.sampler import Sampler
from hdpo_train.evaluation.samples import read_samples
from hdpo_train.evaluation.scores import Evaluation
from hdpo_train.files import write_whole
from hdpo_train.model.loading import in_gguf
from hdpo_train.parser import Parser, WideHelp, add_option
from hdpo_train.processes import group, locked_by_main
from hdpo_train.run.output_dir import check_output_dir

RESULTS_FILE, TABLE_FILE, PLOT_FILE = "results.json", "results.md", "results.png"
_DESCRIPTION = """\
What models can do on prompts whose answers a program checks: greedy and sampled accuracy, pass@k, diversity, entropy,
with 95 % intervals.

  hdpo-train eval --model_name_or_path MODEL --prompts test.jsonl --checker gsm8k --output_dir eval
                                        a line of test.jsonl: {"prompt": "…", "answer": "… #### 12"}
  hdpo-train eval --model_name_or_path BEFORE AFTER --prompts test.jsonl --prompt_column question --checker choice \\
      --temperatures 0.5 0.7 1.0 --num_samples 32 --k 1 8 32 --output_dir eval
  hdpo-train eval --samples vllm.jsonl --prompts test.jsonl --checker my_checks.py:is_right --output_dir eval
                                        samples of any engine: {"prompt": "…", "completions": ["…", "…"]}

Killed, the same command goes on where it was. results.json, results.md and results.png are of the last call.
"""


def main(argv: list[str]) -> None:
    options = _parser().parse(argv)
    logging.disable_progress_bar()
    folder = check_output_dir(options.output_dir)
    with group() as processes, locked_by_main(processes, folder):  # two at once would tear each other's samples
        evaluations = run(options, processes)
        if processes.is_main_process:
            _write(evaluations, folder)


def _write(evaluations: Sequence[Evaluation], folder: Path) -> None:
    text = json.dumps([asdict(each) for each in evaluations], indent=2, ensure_ascii=False)
    table = markdown(evaluations)
    write_whole(folder / RESULTS_FILE, text + "\n")
    write_whole(folder / TABLE_FILE, table + "\n")
    written = [RESULTS_FILE, TABLE_FILE, *([PLOT_FILE] if drawn(draw, evaluations, folder / PLOT_FILE) else [])]
    print(f"{table}\n\nWritten: {', '.join(str(folder / name) for name in written)}")


def run(options: argparse.Namespace, processes: PartialState) -> list[Evaluation]:
    """Evaluations of models, then of ready-made samples; only of the main process. Raises ValueError, OSError.

    What can be refused without a model is refused before the first is loaded. A KeyboardInterrupt says what is drawn.
    """
    models = [in_gguf(name, options.gguf_file) for name in options.model_name_or_path]
    files = [Path(name) for name in options.samples]
    if not models and not files:
        raise ValueError("there is nothing to evaluate: give --model_name_or_path or --samples")
    names = _names([*models, *options.samples], options.names)
    settings, folder = _settings(options, options.num_samples), Path(options.output_dir)
    problems, checker = load_judged_problems(options, options.limit)
    ready_made = []
    for path in files:
        samples = read_samples(path, problems, settings.stop)
        num_samples = max(sample.number for sample in samples) + 1
        if too_many := [k for k in options.k or () if k > num_samples]:
            raise ValueError(f"{path} has {num_samples} samples of a prompt: too few for --k {too_many[0]}")
        ready_made.append((samples, _settings(options, num_samples)))
    folder.mkdir(parents=True, exist_ok=True)
    samplers: list[Sampler] = []
    evaluations = []
    try:
        for model, name in zip(models, names, strict=False):
            path = folder / f"samples-{name}.jsonl"
            samplers.append(make_sampler(model, problems, settings.sampling, path, options, name=name))
        for model, sampler in zip(models, samplers, strict=True):
            samples_of(model, sampler, options, processes)
        if not processes.is_main_process:
            return []
        evaluations += [grade(each.name, problems, checker, each.samples, settings) for each in samplers]
        for (samples, of_file), name in zip(ready_made, names[len(models) :], strict=True):
            evaluations.append(grade(name, problems, checker, samples, of_file))
    except KeyboardInterrupt:
        there = (
            " and ".join(f"{len(sampler.samples)} samples of {sampler.name}" for sampler in samplers) or "no samples"
        )
        raise KeyboardInterrupt(f"interrupted; {folder} has {there}, and the same command goes on from there") from None
    return evaluations


def _settings(options: argparse.Namespace, num_samples: int) -> EvalOptions:
    return EvalOptions(
        num_samples=num_samples,
        temperatures=tuple(options.temperatures),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
        stop=tuple(options.stop),
        k=tuple(options.k or (k for k in DEFAULT_K if k <= num_samples)),
        self_bleu=not options.no_self_bleu,
    )


def _names(sources: Sequence[str], given: Sequence[str]) -> list[str]:
    """What to call models and files of samples: the last part of a path, or what --names says."""
    if given and len(given) != len(sources):
        raise ValueError(f"--names gives {len(given)} names to {len(sources)} models and files of samples")
    names = list(given) or [re.sub(r"\.jsonl(\.gz)?$", "", Path(source).resolve().name) for source in sources]
    if "" in names:
        raise ValueError(f"a name is empty: --names gives {' '.join(map(repr, names))}")
    names = [re.sub(r"[^\w.-]", "_", name) for name in names]  # they become file names
    for number, name in enumerate(names):
        if name in names[:number]:
            both = f"{sources[names.index(name)]} and {sources[number]}"
            raise ValueError(f"{both} would both be called {name}: --names gives every one a name")
    return names


def _parser() -> Parser:
    parser = Parser(
        prog="hdpo-train eval",
        description=_DESCRIPTION,
        formatter_class=WideHelp,
        allow_abbrev=False,
    )

    add = functools.partial(add_option, parser)
    add(
        "model_name_or_path",
        "Models to evaluate: local folders or hub ids, or GGUF files there.",
        nargs="+",
        default=[],
        metavar="MODEL",
    )
    add("gguf_file", "GGUF file in the folder or repository of each model.", metavar="FILE")
    add(
        "samples",
        "Files of ready-made samples to evaluate, JSONL. Their entropy is known only if this command drew them.",
        nargs="+",
        default=[],
        metavar="FILE",
    )
    add(
        "names",
        "Names in the results, of the models first and then of the files of samples. Default: the last part of each "
        "path.",
        nargs="+",
        default=[],
        metavar="NAME",
    )
    add_problem_options(parser)
    add("limit", "Evaluate the first N prompts only.", type=int, metavar="N")
    add("output_dir", "Folder for samples and results.", required=True, metavar="FOLDER")
    add("num_samples", "Samples of each prompt at each temperature.", type=int, default=16, metavar="N")
    add(
        "temperatures",
        "Temperatures to sample at; greedy completions are always drawn.",
        type=float,
        nargs="*",
        default=[1.0],
        metavar="T",
    )
    add(
        "k",
        "Values of k for pass@k (default: those of 1 4 8 that num_samples allows)",
        type=int,
        nargs="+",
        metavar="K",
    )
    add("seed", "Seed of the samples and of the intervals.", type=int, default=0, metavar="N")
    add_sampling_options(parser, "Ready-made samples are cut too, and then have no entropy.")
    add("no_self_bleu", "Leave out self-BLEU, which needs the package sacrebleu.", action="store_true")
    return parser
