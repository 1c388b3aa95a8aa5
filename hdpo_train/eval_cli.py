"""hdpo-train eval: models, or ready-made samples, on a file of prompts whose answers a checker knows.

prompts ── problems ─┬─ model ── Sampler ──> samples-<name>.jsonl ─┬─ grade ──> results.json, results.md, results.png
                     └─ --samples FILE ────────────────────────────┘
"""

import argparse
import gc
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from hdpo_train.checkers import Problem, make_checker
from hdpo_train.command_line import Parser, check_output_dir
from hdpo_train.eval_report import draw, drawn, markdown
from hdpo_train.evaluate import EvalOptions, check_records, grade
from hdpo_train.files import write_whole
from hdpo_train.forms import written_rows
from hdpo_train.generate import Sampler, files_fingerprint
from hdpo_train.lock import locked
from hdpo_train.models import in_gguf, load_model, load_tokenizer
from hdpo_train.records import load_records
from hdpo_train.samples import Sample, read_samples
from hdpo_train.scores import Evaluation, as_json

RESULTS_FILE, TABLE_FILE, PLOT_FILE = "results.json", "results.md", "results.png"
DEFAULT_K = (1, 4, 8)
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
_CHECKERS = """\
What decides whether a completion is right. gsm8k compares final numbers, choice compares letters, regex:PATTERN (or
regex, with the pattern in the answer column) searches the completion, path/to/file.py:function or
package.module:function is called with prompt, completion and record, and unit_tests runs the tests of a record with
HumanEval's columns (with --run_code only)."""


def main(argv: list[str]) -> None:
    options = _parser().parse(argv)
    logging.disable_progress_bar()
    with locked(folder := check_output_dir(options.output_dir)):  # two at once would tear each other's samples
        _evaluate(options, folder)


def _evaluate(options: argparse.Namespace, folder: Path) -> None:
    evaluations = run(options)
    text = json.dumps([as_json(each) for each in evaluations], indent=2, ensure_ascii=False)
    table = markdown(evaluations)
    write_whole(folder / RESULTS_FILE, text + "\n")
    write_whole(folder / TABLE_FILE, table + "\n")
    written = [RESULTS_FILE, TABLE_FILE, *([PLOT_FILE] if drawn(draw, evaluations, folder / PLOT_FILE) else [])]
    print(f"{table}\n\nWritten: {', '.join(str(folder / name) for name in written)}")


def run(options: argparse.Namespace) -> list[Evaluation]:
    """Evaluations of models, then of ready-made samples. Raises ValueError, OSError.

    What can be refused without a model is refused before the first is loaded. A KeyboardInterrupt says what is drawn.
    """
    models = [in_gguf(name, options.gguf_file) for name in options.model_name_or_path]
    files = [Path(name) for name in options.samples]
    if not models and not files:
        raise ValueError("there is nothing to evaluate: give --model_name_or_path or --samples")
    names = _names([*models, *options.samples], options.names)
    settings, folder = _settings(options, options.num_samples), Path(options.output_dir)
    problems = load_problems(options.prompts, prompt_column=options.prompt_column, limit=options.limit)
    checker = make_checker(
        options.checker, answer_column=options.answer_column, run_code=options.run_code,
        timeout=options.checker_timeout, allow_network=options.allow_network,
    )  # fmt: skip
    check_records(checker, problems, options.checker)
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
            tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
            samplers.append(Sampler(problems, tokenizer, settings.sampling, name=name))
            samplers[-1].keep_in(folder / f"samples-{name}.jsonl", f"{files_fingerprint(model)} {options.dtype}")
        for model, sampler in zip(models, samplers, strict=True):
            evaluations.append(grade(sampler.name, problems, checker, _samples(model, sampler, options), settings))
        for (samples, of_file), name in zip(ready_made, names[len(models) :], strict=True):
            evaluations.append(grade(name, problems, checker, samples, of_file))
    except KeyboardInterrupt:
        there = (
            " and ".join(f"{len(sampler.samples)} samples of {sampler.name}" for sampler in samplers) or "no samples"
        )
        raise KeyboardInterrupt(f"interrupted; {folder} has {there}, and the same command goes on from there") from None
    return evaluations


def load_problems(name: str, *, prompt_column: str = "prompt", limit: int | None = None) -> list[Problem]:
    """The problems of a .jsonl, .json (also .gz) or .parquet file: in the column of prompts, texts or chat messages.

    limit: so many from the start. Raises FileNotFoundError, or ValueError for a file that is empty or malformed, lacks
    the column, or has something else in it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    dataset = load_records(name)
    if prompt_column not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"{name} has no column {prompt_column!r}, it has {columns}: --prompt_column names the prompts")
    problems = []
    rows = written_rows(dataset.select(range(min(limit or len(dataset), len(dataset)))))
    for number, record in enumerate(rows, 1):
        prompt = record[prompt_column]
        if not isinstance(prompt, str | list):
            raise ValueError(f"{name}, record {number}: {prompt_column} is neither a text nor messages, but {prompt!r}")
        problems.append(Problem(prompt, record))
    if not problems:
        raise ValueError(f"{name} is empty: there is no prompt in it")
    return problems


def _samples(model_name_or_path: str, sampler: Sampler, options: argparse.Namespace) -> list[Sample]:
    """Drawn, or read where none is missing; the model is gone afterwards, so that there is never more than one."""
    if not sampler.missing:
        return sampler.samples
    kwargs = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    model = load_model(model_name_or_path, kwargs)
    samples = sampler.run(model.to("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return samples


def _settings(options: argparse.Namespace, num_samples: int) -> EvalOptions:
    return EvalOptions(
        num_samples=num_samples,
        temperatures=tuple(options.temperatures),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
        stop=tuple(map(_unescaped, options.stop)),
        k=tuple(options.k or (k for k in DEFAULT_K if k <= num_samples)),
        self_bleu=not options.no_self_bleu,
    )


def _unescaped(text: str) -> str:
    """A stop string as a shell gives it: few people know how to write a line break there."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)


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
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=118),
        allow_abbrev=False,
    )

    def add(name: str, text: str, **kwargs) -> None:
        default = kwargs.get("default")
        if default not in (None, []):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            text += f" (default: {shown})"
        parser.add_argument(f"--{name}", help=text, **kwargs)

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
    add(
        "prompts",
        "File of prompts, JSONL (also .gz) or Parquet. A prompt is a string or a list of chat messages.",
        required=True,
        metavar="FILE",
    )
    add("prompt_column", "Column that holds the prompts.", default="prompt", metavar="COLUMN")
    add("answer_column", "Column that holds the right answers.", default="answer", metavar="COLUMN")
    add("limit", "Evaluate the first N prompts only.", type=int, metavar="N")
    add("checker", _CHECKERS, required=True)
    add("run_code", "Let unit_tests run the programs that the model wrote.", action="store_true")
    add(
        "checker_timeout",
        "What a checker may take for one completion; beyond that the completion is wrong.",
        type=float,
        default=10.0,
        metavar="SECONDS",
    )
    add(
        "allow_network",
        "Run unit tests even if this kernel cannot isolate them from the network.",
        action="store_true",
    )
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
    add("max_new_tokens", "Most tokens of a completion.", type=int, default=256, metavar="N")
    add(
        "stop",
        r"Strings that end a completion: it is cut before the first of them. \n is a line break, \t a tab. Ready-made "
        "samples are cut too, and then have no entropy.",
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT",
    )
    add("batch_size", "Sequences that are generated at a time.", type=int, default=64, metavar="N")
    add("seed", "Seed of the samples and of the intervals.", type=int, default=0, metavar="N")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("dtype", "Data type of the weights; auto: the one they were saved in.", choices=dtypes, default="auto")
    add("no_self_bleu", "Leave out self-BLEU, which needs the package sacrebleu.", action="store_true")
    add("trust_remote_code", "Run Python code that comes with a model.", action="store_true")
    return parser
