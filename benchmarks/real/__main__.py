"""What the tables of made-up models say, on a real pretrained one: make real, or python -m benchmarks.real

SmolLM2-135M-Instruct, from the package index, on pairs of its own answers, and on real records where the folder
shared/data lies beside the project. Beside TRL's DPOTrainer, in one process:

  trajectory   steps on short pairs: the same losses and parameters, their time and memory
  step         a step on one long pair of real text, also with checkpointing
  log-prob     the log-prob of a sequence from bf16 hidden states and weights, against fp64
  sampled      entries and error of the sampled gradient on real logits, beside dropping the tail
  entropy      after a few dozen steps in bf16 autocast, with the head's sums in fp32 and rounded to bf16

About 20 minutes on two cores; --long adds a pair of 2 × 2,048 tokens, for which TRL needs 10 GiB and that time again.
Results: results/real.csv, written after each question; `python -m benchmarks.report` makes tables of them.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.harness import start_afresh
from benchmarks.real import data, logits, report, rounding, training
from benchmarks.real.data import Pairs
from benchmarks.table import RESULTS, Table, read

QUESTIONS = ("trajectory", "log-prob", "sampled", "entropy", "step")
LONG = 2048  # tokens of a sequence, with --long


Task = tuple[str, str, Callable[[Table], None]]  # question, name, what measures it


def tasks(folder: Path, pairs: list[Pairs], options: argparse.Namespace) -> list[Task]:
    """What was asked for, the heaviest last."""
    found: list[Task] = []
    steps = 2 if options.quick else 5
    for each in pairs:
        name = f"{each.name}, {steps} steps of 2 pairs"
        work = training.Work("trajectory", name, each.records[: 2 * steps], 2, steps, rounds=options.rounds)
        found.append(("trajectory", name, partial(training.measure, folder=folder, work=work)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = [64] if options.quick else [1024, LONG] if options.long else [1024]
    for tokens in lengths:
        text, record = data.long_pair(pairs, tokenizer, tokens)
        name = f"2 × {tokens} tokens of {text}"

        def accuracy(table: Table, name: str = name, record: data.Record = record) -> None:
            logits.accuracy(table, name, logits.problem_of(folder, [record], 10**9))

        found.append(("log-prob", name, accuracy))
    for each in pairs:
        name = f"{each.name}, answers"

        def sampled(table: Table, name: str = name, each: Pairs = each) -> None:
            problem = logits.problem_of(folder, each.records, 100 if options.quick else 1200)
            logits.sampled(table, f"{name}, {len(problem.labels)} tokens", problem)

        found.append(("sampled", name, sampled))
    some = pairs[min(1, len(pairs) - 1)]
    size = (2, 1) if options.quick else (rounding.STEPS, rounding.SEEDS)

    def entropy(table: Table) -> None:
        rounding.measure(table, folder, some, *size)

    found.append(("entropy", some.name, entropy))
    for tokens in lengths:
        text, record = data.long_pair(pairs, tokenizer, tokens)
        for checkpointing in (False, True):
            name = f"one pair of 2 × {tokens} tokens of {text}" + ", checkpointing" * checkpointing
            work = training.Work("step", name, [record], 1, 2, 0, options.rounds, checkpointing)
            found.append(("step", name, partial(training.measure, folder=folder, work=work)))
    return [task for task in found if task[0] in options.only]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=QUESTIONS, metavar="QUESTION")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="runs of each trainer (default: 1)")
    parser.add_argument("--long", action="store_true", help=f"also one pair of 2 × {LONG} tokens")
    parser.add_argument("--quick", action="store_true", help="few steps, few tokens: does it run? Needs --out")
    parser.add_argument("--out", type=Path, help=f"folder of real.csv (default: {RESULTS})")
    options = parser.parse_args(argv)
    if options.quick and options.out is None:
        parser.error("--quick needs --out: its figures mean nothing and must not replace the others")
    if reason := data.missing():
        sys.exit(f"python -m benchmarks.real: {reason}")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    folder, out = data.model_folder(), options.out or RESULTS
    table = Table("cpu", "real", digits=6)
    for question, name, measure in tasks(folder, data.all_pairs(folder), options):
        print(f"… {question}: {name}", file=sys.stderr, flush=True)
        start_afresh()
        measure(table)
        table.write(out)
    rows = read(table.path(out))
    print(f"\n{report.long(rows)}\n\n{report.sampled(rows)}")


if __name__ == "__main__":
    main()
