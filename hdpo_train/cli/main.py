"""The commands of hdpo-train, each in a file of its own that has main(argv)."""

import importlib
import io
import sys

from hdpo_train.cli.errors import end, run_command
from hdpo_train.options import is_file_of_options
from hdpo_train.parser import did_you_mean

COMMANDS = ("train", "plan", "pairs", "eval", "sweep", "quickstart")  # modules of this folder that have main(argv)


def main(argv: list[str] | None = None) -> None:
    """A command of the command line. Exit codes: 2 for an error that is said in words, 130 after Ctrl-C,
    143 after a SIGTERM that left a checkpoint."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in Latin-1 or ASCII there is no α: the program goes on with \u03b1
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        name = "quickstart"
    elif argv[0].startswith("-") or is_file_of_options(argv[0]):
        name = "train"
    else:
        name = argv.pop(0)
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS)
        end("hdpo-train", f"no command {name!r}{near or '; there are ' + ', '.join(COMMANDS)}", 2)

    def command(argv: list[str]) -> None:
        importlib.import_module(f"hdpo_train.cli.{name}").main(argv)

    run_command("hdpo-train" if name == "train" else f"hdpo-train {name}", command, argv)
