"""The command line, hdpo-train (= python -m hdpo_train; accelerate launch -m hdpo_train …): which command runs.

Nothing heavy is imported before the command is known: help, and a command that does not exist, are answered at once.
"""

import importlib
import io
import os
import sys

from hdpo_train.cli.errors import end, run_command
from hdpo_train.parser import HELP, did_you_mean, is_file_of_options

COMMANDS = {  # of each there is a module with main(argv) in this folder
    "train": "train a model on preference pairs; the word may be left out",
    "plan": "memory and time of a step, or the longest pair that fits, before anything runs",
    "pairs": "preference pairs of a model's own answers, which a program judges",
    "eval": "accuracy, pass@k, diversity and entropy of models on a file of prompts",
    "sweep": "several α and seeds, each evaluated, in one report: what does α do?",
    "quickstart": "all of it on a small task, on this machine, in a few minutes and without a download",
}
_HELP = """\
hdpo-train: preference training (H-DPO) with control over entropy by one number, alpha.

usage: hdpo-train COMMAND [--option value …]

{commands}

  hdpo-train COMMAND --help       its options, with examples
  hdpo-train --model_name_or_path MODEL --dataset_name pairs.jsonl --alpha 0.95 --output_dir out
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command that argv begins with, or train where it begins with an option or a YAML file.

    Exit codes: 2 for an error that is said in words, 130 after Ctrl-C, 143 after a SIGTERM that left a checkpoint.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in Latin-1 or ASCII there is no α: the program goes on with \u03b1
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in HELP:
        lines = (f"  {name:12}{text}" for name, text in COMMANDS.items())
        print(_HELP.format(commands="\n".join(lines)), end="")
        return
    name = "train" if argv[0].startswith("-") or is_file_of_options(argv[0]) else argv.pop(0)
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS)
        end("hdpo-train", f"no command {name!r}{near or '; there are ' + ', '.join(COMMANDS)}", 2)

    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # one process shows progress; tqdm reads this when it is imported

    def command(argv: list[str]) -> None:
        importlib.import_module(f"hdpo_train.cli.{name}").main(argv)

    run_command("hdpo-train" if name == "train" else f"hdpo-train {name}", command, argv)
