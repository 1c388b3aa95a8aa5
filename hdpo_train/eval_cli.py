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
from hdpo_train.eval_report import draw, markdown
from hdpo_train.evaluate import EvalOptions, grade, judge
from hdpo_train.generate import Sampler, files_fingerprint
from hdpo_train.models import load_model, load_tokenizer
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
gsm8k: the final number; choice: the letter; regex:PATTERN, or regex with the pattern in the answer column;
path/to/file.py:function or package.module:function, called with prompt, completion and record; unit_tests: HumanEval's
columns, needs --run_code"""


def main(argv: list[str]) -> None:
    options = _parser().parse(argv)
    logging.disable_progress_bar()
    evaluations = run(options)
    folder = Path(options.output_dir)
    text = json.dumps([as_json(each) for each in evaluations], indent=2, ensure_ascii=False)
    (folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
    table = markdown(evaluations)
    (folder / TABLE_FILE).write_text(table + "\n", encoding="utf-8")
    draw(evaluations, folder / PLOT_FILE)
    print(f"{table}\n\nWritten: {', '.join(str(folder / name) for name in (RESULTS_FILE, TABLE_FILE, PLOT_FILE))}")


def run(options: argparse.Namespace) -> list[Evaluation]:
    """Evaluations of models, then of ready-made samples. Raises ValueError, OSError.

    What can be refused without a model is refused before the first is loaded.
    """
    models, files = options.model_name_or_path, [Path(name) for name in options.samples]
    if not models and not files:
        raise ValueError("there is nothing to evaluate: give --model_name_or_path or --samples")
    names = _names([*models, *options.samples], options.names)
    folder = check_output_dir(options.output_dir)
    problems = load_problems(options.prompts, prompt_column=options.prompt_column, limit=options.limit)
    checker = make_checker(
        options.checker, answer_column=options.answer_column, run_code=options.run_code,
        allow_network=options.allow_network,
    )  # fmt: skip
    runs_code = options.checker.split(":")[0] not in ("gsm8k", "choice", "regex")
    for number, problem in enumerate(problems[:1] if runs_code else problems, 1):
        judge(checker, problem, "", number)  # are the records what the checker needs?
    settings = _settings(options, options.num_samples)
    folder.mkdir(parents=True, exist_ok=True)
    ready_made = []
    for path, name in zip(files, names[len(models) :], strict=True):
        samples = read_samples(path, problems, settings.stop)
        num_samples = max(sample.number for sample in samples) + 1
        ready_made.append(grade(name, problems, checker, samples, _settings(options, num_samples)))
    samplers = []
    for model, name in zip(models, names, strict=False):
        tokenizer = load_tokenizer(model, trust_remote_code=options.trust_remote_code)
        samplers.append(Sampler(problems, tokenizer, settings.sampling, name=name))
        samplers[-1].keep_in(folder / f"samples-{name}.jsonl", f"{files_fingerprint(model)} {options.dtype}")
    evaluations = []
    for model, sampler in zip(models, samplers, strict=True):
        evaluations.append(grade(sampler.name, problems, checker, _samples(model, sampler, options), settings))
    return evaluations + ready_made


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
    for number, record in enumerate(dataset.select(range(min(limit or len(dataset), len(dataset)))), 1):
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

    add("model_name_or_path", "local folders or hub ids", nargs="+", default=[], metavar="MODEL")
    add(
        "samples",
        "ready-made samples, JSONL; entropy only of our own",
        nargs="+",
        default=[],
        metavar="FILE",
    )
    add("names", "what to call them, models first", nargs="+", default=[], metavar="NAME")
    add("prompts", "JSONL (also .gz) or Parquet; strings or chat messages", required=True, metavar="FILE")
    add("prompt_column", "of prompts", default="prompt", metavar="COLUMN")
    add("answer_column", "of right answers", default="answer", metavar="COLUMN")
    add("limit", "only so many prompts, from the start", type=int, metavar="N")
    add("checker", _CHECKERS, required=True)
    add("run_code", "let unit_tests run what the model wrote", action="store_true")
    add("allow_network", "also where that cannot be cut off from the network", action="store_true")
    add("output_dir", "folder of samples and results", required=True, metavar="FOLDER")
    add("num_samples", "of each prompt at each temperature", type=int, default=16, metavar="N")
    add("temperatures", "beside greedy", type=float, nargs="*", default=[1.0], metavar="T")
    add("k", "of pass@k (default: those of 1 4 8 that num_samples allows)", type=int, nargs="+", metavar="K")
    add("max_new_tokens", "of a completion", type=int, default=256, metavar="N")
    add(
        "stop",
        r"a completion ends before the first of these; \n is a line break, \t a tab; ready-made samples are cut too, "
        "and have no entropy then",
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT",
    )
    add("batch_size", "sequences at a time", type=int, default=64, metavar="N")
    add("seed", "of samples and intervals", type=int, default=0, metavar="N")
    add("dtype", "of the weights", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("no_self_bleu", "leave self-BLEU out, which needs sacrebleu", action="store_true")
    add("trust_remote_code", "run code that comes with a model", action="store_true")
    return parser
