"""What eval, pairs and sweep begin with: prompts whose answers a checker knows, and a model's samples of them.

options ─┬─ load_problems, make_checker, check_records ──> problems, checker
         └─ Sampler, load_model ──> samples, appended to a file
"""

import argparse
import gc
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from hdpo_train.evaluation.checkers import Checker, make_checker
from hdpo_train.evaluation.evaluate import check_records
from hdpo_train.evaluation.problems import Problem, load_problems
from hdpo_train.evaluation.sampler import Sampler, SamplingOptions
from hdpo_train.evaluation.samples import Sample
from hdpo_train.model.fingerprint import files_fingerprint
from hdpo_train.model.loading import load_model, load_tokenizer
from hdpo_train.parser import OptionGroup, add_option
from hdpo_train.ranks import together

_CHECKERS = """\
What decides whether a completion is right. gsm8k compares final numbers, choice compares letters, regex:PATTERN (or
regex, with the pattern in the answer column) searches the completion, path/to/file.py:function or
package.module:function is called with prompt, completion and record, and unit_tests runs the tests of a record with
HumanEval's columns (with --run_code only)."""


def add_problem_options(group: OptionGroup, *, required: bool = True) -> None:
    """The options that `load_judged_problems` reads. required: refuse a command line without prompts or checker."""
    add_option(
        group,
        "prompts",
        "File of prompts, JSONL (also .gz) or Parquet. A prompt is a string or a list of chat messages.",
        required=required,
        metavar="FILE",
    )
    add_option(group, "prompt_column", "Column that holds the prompts.", default="prompt", metavar="COLUMN")
    add_option(group, "answer_column", "Column that holds the right answers.", default="answer", metavar="COLUMN")
    add_option(group, "checker", _CHECKERS, required=required)
    add_option(group, "run_code", "Let unit_tests run the programs that the model wrote.", action="store_true")
    add_option(
        group,
        "checker_timeout",
        "What a checker may take for one completion; beyond that it has not judged it.",
        type=float,
        default=10.0,
        metavar="SECONDS",
    )
    add_option(
        group,
        "allow_network",
        "Run unit tests even if this kernel cannot isolate them from the network.",
        action="store_true",
    )


def load_judged_problems(options: argparse.Namespace, limit: int | None = None) -> tuple[list[Problem], Checker]:
    """The problems that the options name, and a checker that can judge them.

    limit: so many from the start. Raises what `load_problems`, `make_checker` and `check_records` raise.
    """
    problems = load_problems(options.prompts, prompt_column=options.prompt_column, limit=limit)
    checker = make_checker(
        options.checker,
        answer_column=options.answer_column,
        run_code=options.run_code,
        timeout=options.checker_timeout,
        allow_network=options.allow_network,
    )
    check_records(checker, problems, options.checker)
    return problems, checker


def add_sampling_options(group: OptionGroup, of_ready_made: str) -> None:
    """Options of the samples that `make_sampler` and `samples_of` make.

    of_ready_made: what --stop does to ready-made ones.
    """
    add_option(group, "max_new_tokens", "Most tokens of a completion.", type=int, default=256, metavar="N")
    add_option(
        group,
        "stop",
        rf"Strings that end a completion: it is cut before the first of them. \n is a line break, \t a tab. "
        f"{of_ready_made}",
        type=_unescaped,
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT",
    )
    add_option(group, "batch_size", "Sequences that are generated at a time.", type=int, default=64, metavar="N")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    text = "Data type of the weights; auto: the one they were saved in."
    add_option(group, "dtype", text, choices=dtypes, default="auto")
    add_option(group, "trust_remote_code", "Run Python code that comes with a model.", action="store_true")


def make_sampler(
    model_name_or_path: str,
    problems: Sequence[Problem],
    sampling: SamplingOptions,
    path: Path,
    options: argparse.Namespace,
    *,
    name: str,
    entropy: bool = True,
) -> Sampler:
    """A Sampler that goes on from the samples in the file `path`; the model itself is not loaded."""
    tokenizer = load_tokenizer(model_name_or_path, trust_remote_code=options.trust_remote_code)
    sampler = Sampler(problems, tokenizer, sampling, name=name, entropy=entropy)
    sampler.keep_in(path, f"{files_fingerprint(model_name_or_path)} {options.dtype}")
    return sampler


def samples_of(
    model_name_or_path: str, sampler: Sampler, options: argparse.Namespace, processes: PartialState
) -> list[Sample]:
    """The sampler's samples. A model is loaded only if some are missing, and freed afterwards.

    Raises ValueError if processes do not go on from the same samples.
    """
    missing = gather_object([sampler.missing])
    if len(set(missing)) > 1:
        raise ValueError(
            f"{sampler.name}: the processes lack {', '.join(map(str, missing))} batches of samples; the output must be "
            "in a folder that all of them see"
        )
    if not sampler.missing:
        return sampler.samples
    kwargs = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    model: Any = together(lambda: load_model(model_name_or_path, kwargs).to(processes.device))  # type: ignore[arg-type]
    samples = sampler.run(model, processes)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return samples


def _unescaped(text: str) -> str:
    """A stop string as a shell gives it: few people know how to write a line break there."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)
