"""hdpo-train pairs: from prompts whose answers a checker knows to preference pairs that hdpo-train trains on.

prompts ── problems ─┬─ model ── Sampler ──> NAME.samples.jsonl ─┬─ judge ── draw_pairs ──> NAME.jsonl
                     └─ --samples FILE ──────────────────────────┘                          NAME.summary.json
"""

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hdpo_train.cli.judging import (
    add_problem_options,
    add_sampling_options,
    load_judged_problems,
    make_sampler,
    samples_of,
)
from hdpo_train.data.forms import BadRecord, from_messages
from hdpo_train.evaluation.checkers import Checker
from hdpo_train.evaluation.pairs import Judged, Pair, draw_pairs, judge_samples
from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.sampler import SamplingOptions
from hdpo_train.evaluation.samples import Sample, read_samples
from hdpo_train.files import write_whole
from hdpo_train.model.loading import in_gguf
from hdpo_train.parser import Parser, UsageError, WideHelp, add_option
from hdpo_train.processes import group, locked_by_main
from hdpo_train.run.output_dir import check_output_dir

ENDING = ".jsonl"
UNEQUAL = 1.25  # mean lengths whose quotient is beyond this are warned of
_OF_DRAWING = ("num_samples", "temperature", "max_new_tokens", "batch_size", "dtype", "gguf_file", "trust_remote_code")
_OF_TEMPLATES = ("tools", "chat_template_kwargs")  # columns that a chat's prompt depends on
_DESCRIPTION = """\
Preference pairs of a model's own answers: to each prompt samples are drawn and judged, and right ones are preferred to
wrong ones.

  hdpo-train pairs --model_name_or_path MODEL --prompts train.jsonl --checker gsm8k --output pairs.jsonl
                                        a line of train.jsonl: {"prompt": "…", "answer": "… #### 12"}
  hdpo-train pairs --samples vllm.jsonl --prompts train.jsonl --checker my_checks.py:is_right --output pairs.jsonl
                                        samples of any engine: {"prompt": "…", "completions": ["…", "…"]}

Then hdpo-train --dataset_name pairs.jsonl trains on them, and hdpo-train eval measures what that has changed. Beside
the pairs are a summary, and the samples, to which batches are appended while they are drawn: killed, the same command
goes on where it was and ends with the same pairs.
"""


def main(argv: list[str]) -> None:
    options = _parser().parse(argv)
    given = {word.partition("=")[0].removeprefix("--") for word in argv}
    if options.samples and (useless := [name for name in _OF_DRAWING if name in given]):
        raise UsageError(f"--{useless[0]} has no effect on ready-made samples: leave it out, or leave out --samples")
    output = Path(options.output)
    if not output.name.endswith(ENDING) or output.is_dir():
        raise ValueError(f"--output must be a file whose name ends in {ENDING}, got {options.output}")
    logging.disable_progress_bar()
    folder = check_output_dir(str(output.parent), "--output")
    with group() as processes, locked_by_main(processes, folder, output.name):
        if text := run(options, output, processes):
            print(text)


def run(options: argparse.Namespace, output: Path, processes: PartialState) -> str | None:
    """Write pairs and summary, and the samples of a model beside them; returns what to print.

    A process that is not the main one only draws samples, and returns None.

    Raises ValueError, OSError. What can be refused without a model is refused before it is loaded. A KeyboardInterrupt
    says what is there.
    """
    summary_file, samples_file = (_beside(output, name) for name in ("summary.json", f"samples{ENDING}"))
    settings = json.loads(json.dumps({name: value for name, value in vars(options).items() if name != "output"}))
    _check_output(output, summary_file, settings)
    if options.pairs_per_prompt < 1:
        raise ValueError(f"--pairs_per_prompt must be at least 1, got {options.pairs_per_prompt}")
    if options.match_lengths is not None and not 0 <= options.match_lengths <= 1:
        raise ValueError(f"--match_lengths takes a share from 0 to 1, or nothing, got {options.match_lengths:g}")
    sampling = _sampling(options)
    problems, checker = load_judged_problems(options, options.limit)
    name = output.name.removesuffix(ENDING)
    try:
        samples = _samples(options, problems, sampling, samples_file, name, processes)
        if not processes.is_main_process:
            return None
        judged, pairs, unmatched = _pairs(options, problems, checker, samples, name)
    except KeyboardInterrupt:
        has = f"{samples_file} has what is drawn, and " if samples_file.exists() else ""
        raise KeyboardInterrupt(f"interrupted; {has}the same command goes on from there") from None
    if not pairs:
        raise ValueError(_nothing(judged, options, unmatched))
    summary = _summary(judged, samples, pairs, unmatched)
    records = [_record(problems[pair.prompt], pair) for pair in pairs]
    # The summary first: it says whose the pairs are, and the same command may write them again.
    write_whole(summary_file, json.dumps({**summary, "settings": settings}, indent=2, ensure_ascii=False) + "\n")
    write_whole(output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return f"{_described(summary)}\n\nWritten: {output}, {summary_file}"


def _samples(
    options: argparse.Namespace,
    problems: list[Problem],
    sampling: SamplingOptions,
    path: Path,
    name: str,
    processes: PartialState,
) -> list[Sample]:
    if options.samples:
        return read_samples(Path(options.samples), problems, sampling.stop)
    model = in_gguf(options.model_name_or_path, options.gguf_file)
    sampler = make_sampler(model, problems, sampling, path, options, name=name, entropy=False)
    _check_chats(problems, sampler.tokenizer)
    return samples_of(model, sampler, options, processes)


def _pairs(
    options: argparse.Namespace, problems: list[Problem], checker: Checker, samples: list[Sample], name: str
) -> tuple[Judged, list[Pair], list[Pair]]:
    """The judged answers, their pairs, and those that would be made whatever the lengths."""
    judged = judge_samples(problems, checker, samples, name)
    unmatched = draw_pairs(judged.right, options.pairs_per_prompt, options.seed)
    if options.match_lengths is None:
        return judged, unmatched, unmatched
    pairs = draw_pairs(judged.right, options.pairs_per_prompt, options.seed, judged.lengths, options.match_lengths)
    return judged, pairs, unmatched


def _sampling(options: argparse.Namespace) -> SamplingOptions:
    """Raises ValueError for options under which no prompt has two answers."""
    if not options.samples and options.num_samples < 2:
        raise ValueError(f"--num_samples must be at least 2, a right answer and a wrong one, got {options.num_samples}")
    if not options.temperature > 0:
        raise ValueError(f"--temperature must be above 0, got {options.temperature:g}: greedy answers are all the same")
    return SamplingOptions(
        options.num_samples,
        (options.temperature,),
        options.max_new_tokens,
        options.batch_size,
        options.seed,
        tuple(options.stop),
    )


def _check_output(output: Path, summary_file: Path, settings: dict[str, Any]) -> None:
    """Raises FileExistsError if the pairs in `output` were made by another command."""
    if not output.exists():
        return
    way_out = "choose another --output, or delete that file"
    try:
        found = json.loads(summary_file.read_text(encoding="utf-8"))["settings"]
        different = [key for key in {**settings, **found} if found.get(key) != settings.get(key)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise FileExistsError(
            f"{output} is there, and no {summary_file.name} says how it was made: {way_out}"
        ) from None
    if different:
        key = different[0]
        raise FileExistsError(
            f"{output} was made with {key} = {found.get(key)}, this call has {key} = {settings.get(key)}: {way_out}"
        )


def _check_chats(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for messages that a model can answer, but whose pairs it could not be trained on."""
    for number, problem in enumerate(problems, 1):
        if not isinstance(problem.prompt, str):
            try:
                from_messages(_record(problem, Pair(number, "a", "b")), tokenizer)
            except BadRecord as error:
                raise ValueError(f"prompt {number}: no pair of it could be trained on, because {error}") from error


def _record(problem: Problem, pair: Pair) -> dict[str, Any]:
    """The record that hdpo-train trains on: strings, or messages if the prompt is messages."""
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    if isinstance(problem.prompt, str):
        return {"prompt": problem.prompt, **answers}
    columns = {key: problem.record[key] for key in _OF_TEMPLATES if problem.record.get(key) is not None}
    chats = {key: [{"role": "assistant", "content": answer}] for key, answer in answers.items()}
    return {"prompt": problem.prompt, **chats, **columns}


def _summary(
    judged: Judged, samples: Sequence[Sample], pairs: Sequence[Pair], unmatched: Sequence[Pair]
) -> dict[str, Any]:
    verdicts = [verdict for each in judged.right for verdict in each.values()]
    summary = {
        "prompts": {
            "all": len(judged.right),
            "with right and wrong answers": judged.prompts(True, False),
            "with wrong answers only": judged.prompts(False),
            "with right answers only": judged.prompts(True),
            "without an answer": judged.prompts(),
            "with a pair": len({pair.prompt for pair in pairs}),
        },
        "samples": {
            "all": len(samples),
            "right": sum(verdicts),
            "wrong": len(verdicts) - sum(verdicts),
            **{reason: judged.left_out[reason] for reason in ("repeated", "cut", "empty", "unjudged")},
        },
        "unjudged": dict(judged.faults.most_common()),
        "pairs": len(pairs),
        "unit of lengths": judged.unit,
        "lengths": _lengths(pairs, judged),
    }
    return summary if pairs is unmatched else {**summary, "lengths without matching": _lengths(unmatched, judged)}


def _lengths(pairs: Sequence[Pair], judged: Judged) -> dict[str, dict[str, Any]]:
    both = np.array([[judged.lengths[prompt][answer] for answer in answers] for prompt, *answers in pairs])
    return {
        name: {"mean": float(column.mean()), "quartiles": np.percentile(column, [25, 50, 75]).tolist()}
        for name, column in zip(("chosen", "rejected"), both.T, strict=True)
    }


def _described(summary: dict[str, Any]) -> str:
    prompts, samples, unit = summary["prompts"], summary["samples"], summary["unit of lengths"]
    kinds = [f"{count:,} {kind}" for kind, count in prompts.items() if kind.startswith("with") and count]
    *kinds, _ = kinds  # the last is of the pairs
    reasons = {
        "repeated": "said before",
        "cut": "not ended within max_new_tokens",
        "empty": "empty",
        "unjudged": "that could not be judged",
    }
    left_out = [f"{samples[reason]:,} {text}" for reason, text in reasons.items() if samples[reason]]
    lines = [
        f"{prompts['all']:,} prompts: {', '.join(kinds)}",
        f"{samples['all']:,} samples: {samples['right']:,} different right answers, {samples['wrong']:,} wrong ones"
        + (f"; left out are {', '.join(left_out)}" if left_out else ""),
        *(f"  {count:,} × {fault}" for fault, count in summary["unjudged"].items()),
        f"{summary['pairs']:,} pairs of {prompts['with a pair']:,} prompts",
        f"{unit.capitalize()}: {_both(summary['lengths'])}",
    ]
    if "lengths without matching" in summary:
        lines.append(f"Without --match_lengths: {_both(summary['lengths without matching'])}")
    chosen, rejected = (summary["lengths"][name]["mean"] for name in ("chosen", "rejected"))
    if max(chosen, rejected) > UNEQUAL * min(chosen, rejected):
        longer, times = ("Rejected", rejected / chosen) if rejected > chosen else ("Chosen", chosen / rejected)
        lines.append(
            f"{longer} answers are {times:.2g} times as long as the others: at an α that is not 1 the margin before "
            "training comes from that. --match_lengths pairs answers of similar length (--match_lengths 0.1: within "
            "10 %); hdpo-train --alpha_level token weighs by token."
        )
    return "\n".join(lines)


def _both(lengths: dict[str, dict[str, Any]]) -> str:
    return ", ".join(
        f"{name} {each['mean']:.1f} on average (quartiles {', '.join(f'{value:g}' for value in each['quartiles'])})"
        for name, each in lengths.items()
    )


def _nothing(judged: Judged, options: argparse.Namespace, unmatched: Sequence[Pair]) -> str:
    if unmatched:
        return (
            f"no right and wrong answer to the same prompt are within {options.match_lengths:.0%} of the same length: "
            "give --match_lengths a larger share, or none"
        )
    cut, unjudged = judged.left_out["cut"], judged.left_out["unjudged"]
    return (
        f"none of {len(judged.right)} prompts has both a right and a wrong answer: "
        f"{judged.prompts(False)} have wrong ones only, "
        f"{judged.prompts(True)} right ones only"
        + (f"; {cut} samples did not end within max_new_tokens" if cut else "")
        + (f"; {unjudged} could not be judged ({', '.join(judged.faults)})" if unjudged else "")
        + ". Draw more samples (--num_samples) or more varied ones (--temperature), let them end (--max_new_tokens), "
        "or take prompts that the model answers right now and then"
    )


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(f"{output.name.removesuffix(ENDING)}.{ending}")


def _parser() -> Parser:
    parser = Parser(prog="hdpo-train pairs", description=_DESCRIPTION, formatter_class=WideHelp, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    text = "Model whose answers are sampled: a local folder or a hub id, or a GGUF file there."
    add_option(source, "model_name_or_path", text, metavar="MODEL")
    add_option(source, "samples", "Ready-made samples in place of a model, JSONL.", metavar="FILE")
    add = functools.partial(add_option, parser)
    add("gguf_file", "GGUF file in the model's folder or repository.", metavar="FILE")
    add_problem_options(parser)
    add("limit", "Take the first N prompts only.", type=int, metavar="N")
    add(
        "output",
        f"File of the pairs, {ENDING}; the samples and a summary go beside it.",
        required=True,
        metavar="FILE",
    )
    add("pairs_per_prompt", "Most pairs of a prompt; no answer is used twice.", type=int, default=2, metavar="N")
    add(
        "match_lengths",
        "Pair right and wrong answers that are nearest in length, in tokens, or in characters where samples do not "
        "tell their tokens. With a SHARE from 0 to 1, leave out pairs whose lengths differ by more than that share of "
        "the longer one.",
        type=float,
        nargs="?",
        const=1.0,
        metavar="SHARE",
    )
    add("num_samples", "Samples of each prompt.", type=int, default=8, metavar="N")
    add("temperature", "Temperature to sample at.", type=float, default=1.0, metavar="T")
    add("seed", "Seed of the samples and of the pairs.", type=int, default=0, metavar="N")
    add_sampling_options(parser, "Ready-made samples are cut too.")
    return parser
