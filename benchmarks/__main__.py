"""Run the benchmarks of this machine: python -m benchmarks [--device cpu|cuda] [--only NAME …] [--quick]"""

import argparse
from pathlib import Path

import torch

from benchmarks import accuracy, loss, memory
from benchmarks.harness import RESULTS, Table, device_name

QUESTIONS = {"loss": loss, "memory": memory, "accuracy": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Times, memory and accuracy of the loss beside others, all in one run. Results are rows of a CSV "
        "file with versions, commit and time; ratios are taken within a round, since machines are noisy.",
        epilog="Questions: " + "; ".join(f"{name}: {module.__doc__}" for name, module in QUESTIONS.items()),
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file (default: %(default)s)")
    options = parser.parse_args()
    table = Table(options.device)
    print(device_name(options.device))
    for name in options.only:
        QUESTIONS[name].run(table, options.device, options.quick)
    print(f"\nwritten: {table.write(options.out)}")


if __name__ == "__main__":
    main()
