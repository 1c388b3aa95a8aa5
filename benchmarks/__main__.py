"""Run the benchmarks of this machine: python -m benchmarks [--device cpu|cuda] [--only NAME …] [--quick]"""

import argparse
import math
import signal
import sys
import time
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from benchmarks import accuracy, forward, growth, longest, loss, memory, plots, report, sampled, small, train_step
from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.harness import Deadline, OutOfTime, attempt, start_afresh, use_one_device
from benchmarks.table import RESULTS, Table, device_name, read

# Each has shapes(device, quick), what matters most first, and measure(table, shape, contestants, rounds, deadline).
QUESTIONS = {
    "loss": loss,
    "forward": forward,
    "small": small,
    "memory": memory,
    "accuracy": accuracy,
    "train_step": train_step,
    "growth": growth,
    "sampled": sampled,
    "longest": longest,
}
# Seconds of a question's first shape on a GPU that nobody has measured on: estimates. Later shapes are judged by it.
ESTIMATES = {
    "loss": 75.0,
    "forward": 40.0,
    "small": 10.0,
    "memory": 40.0,
    "accuracy": 20.0,
    "train_step": 60.0,
    "growth": 60.0,
    "sampled": 55.0,
    "longest": 200.0,
}


def in_order(shapes: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    """(question, shape): the first shape of every question, then the second ones, and so on; `longest` after all."""
    columns = [[(question, shape) for shape in each] for question, each in shapes.items()]
    tasks = [task for row in zip_longest(*columns) for task in row if task is not None]
    return sorted(tasks, key=lambda task: task[0] == "longest")


def run(
    tasks: list[tuple[str, Any]], table: Table, contestants: list[Contestant], rounds: int, minutes: float, out: Path
) -> list[str]:
    """Measure what the time allows, writing the table after each task; returns the names of what was left out."""
    deadline = Deadline(60 * minutes)
    fastest: dict[str, float] = {}  # seconds of the question's quickest task so far: the least the next one will take
    left_out = []
    for question, shape in tasks:
        begin = time.monotonic()
        if deadline.left < fastest.get(question, ESTIMATES.get(question, 0)):
            left_out.append(f"{question} of {shape.name}")
            continue
        print(f"… {question} of {shape.name}", file=sys.stderr, flush=True)  # what is written takes a minute or more
        start_afresh()
        try:
            _, status = attempt(partial(QUESTIONS[question].measure, table, shape, contestants, rounds, deadline))
            if status:
                table.add_status(question, shape.name, "", status)
        except OutOfTime:
            left_out.append(f"the rest of {question} of {shape.name}")
        finally:
            table.write(out)
        seconds = time.monotonic() - begin
        fastest[question] = min(seconds, fastest.get(question, seconds))
    return left_out


def main() -> None:
    use_one_device()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times, memory and accuracy of the loss beside others, all in one run. Results are rows of a CSV "
        "file with versions, commit and time; ratios are taken within a round, since machines are noisy.",
        epilog="Questions: " + " ".join(f"{name}: {module.__doc__}" for name, module in QUESTIONS.items()),
    )
    names = [contestant.name for contestant in CONTESTANTS]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), metavar="NAME")
    parser.add_argument("--without", nargs="+", choices=names, default=[], metavar="NAME", help="contestants left out")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: does it run?")
    parser.add_argument("--minutes", type=float, help="what would end later is left out (default: 9 on cuda)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of CSV file and plots (default: %(default)s)")
    options = parser.parse_args()

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    minutes = options.minutes or (9.0 if options.device == "cuda" else math.inf)
    contestants = [contestant for contestant in CONTESTANTS if contestant.name not in options.without]
    tasks = in_order({name: QUESTIONS[name].shapes(options.device, options.quick) for name in options.only})
    table = Table(options.device)
    print(device_name(options.device), flush=True)
    left_out: list[str] = []
    try:
        left_out = run(tasks, table, contestants, 3 if options.quick else 9, minutes, options.out)
        if not left_out and not options.quick:
            table.write(options.out, whole=options.only)
    finally:  # also where the device fails, or somebody stops the run
        pictures = plots.draw(read(table.path(options.out)), options.out, options.device)
        print("\n" + report.tables(table.rows))
        print(f"\nWritten: {', '.join(map(str, [table.path(options.out), *pictures]))}")
        if left_out:
            print(f"\nNot measured, out of time: {'; '.join(left_out)}", flush=True)
    if broken := [row for row in table.rows if row["status"] and not row["contestant"]]:
        sys.exit("\n".join(f"{row['question']} of {row['shape']}: {row['status']}" for row in broken))


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):  # whoever stops it gets what was measured, in the background too
        signal.signal(number, signal.default_int_handler)
    main()
