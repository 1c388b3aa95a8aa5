"""What only a GPU can show, for whoever has one for ten minutes: make gpu, or python -m benchmarks.gpu

Correctness first, then time, memory and accuracy. Every stage is a process of its own with its share of the minutes,
and what an earlier one leaves over: one that hangs is ended, and what it has measured by then stays. Results and plots
are written after each stage, what it printed is in results/gpu-logs, and a table of all stages comes last.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.contest import OUR_RATIO
from benchmarks.contestants import CONTESTANTS, NAIVE, OURS
from benchmarks.harness import use_one_device
from benchmarks.sampled import EXPONENTS, GEMM, SAMPLED, over
from benchmarks.table import RESULTS, Row, device_name, read
from benchmarks.train_step import OURS as OUR_TRAINER
from hdpo_train import markdown

ROOT = Path(__file__).parent.parent
GRACE = 10.0  # seconds from being asked to end until being killed
# What the table says of a question: contestant and metric, of the first shape that has it.
HEADLINES = {
    "loss": (OURS, "share of three GEMMs"),
    "forward": (OURS, "share of one GEMM"),
    "small": (NAIVE, OUR_RATIO),
    "sampled": (SAMPLED.format(EXPONENTS[0]), over(GEMM)),
    "memory": (OURS, "peak memory"),
    "accuracy": (OURS, "log-prob of a sequence"),
    "train_step": (OUR_TRAINER, "speed"),
    "growth": (OUR_TRAINER, "peak memory"),
    "longest": (OUR_TRAINER, "longest sequence"),
}


class Stage(NamedTuple):
    name: str
    share: float  # of the time, beside the shares of the others
    command: Callable[[float], list[str]]  # by the minutes that it has


class Result(NamedTuple):
    name: str
    seconds: float
    status: str  # "ok", "failed" or "out of time"
    said: str  # the last line that it printed


def stages(out: Path, peers: bool) -> list[Stage]:
    names = [contestant.name for contestant in CONTESTANTS if contestant.package and contestant.package != "torch"]
    without = [] if peers else ["--without", *names]

    def tests(*options: str) -> Callable[[float], list[str]]:
        return lambda _: ["-m", "pytest", "-q", "tests/kernels", "-p", "no:cacheprovider", *options]

    def question(name: str) -> Callable[[float], list[str]]:
        options = ["--device", "cuda", "--only", name, "--out", str(out), *without]
        return lambda minutes: ["-m", "benchmarks", *options, "--minutes", f"{minutes:.2f}"]

    # Seconds of ten minutes, GRACE included.
    shares = {
        "loss": 86,
        "forward": 51,
        "small": 22,
        "sampled": 66,
        "memory": 51,
        "accuracy": 31,
        "train_step": 71,
        "growth": 71,
        "longest": 15,
    }
    return [
        Stage("tests at real sizes", 64, tests("-m", "gpu")),
        Stage("other tests", 72, tests("-m", "not gpu")),
        *(Stage(name, share, question(name)) for name, share in shares.items()),
    ]


def run(todo: Sequence[Stage], minutes: float, logs: Path, grace: float = GRACE) -> list[Result]:
    """All stages, one after the other, over within the minutes whatever they do."""
    end = time.monotonic() + 60 * minutes
    logs.mkdir(parents=True, exist_ok=True)
    results = []
    for i, stage in enumerate(todo):
        share = stage.share / sum(each.share for each in todo[i:])
        seconds = max(0.0, (end - time.monotonic()) * share - grace)
        print(f"… {stage.name}, at most {seconds:.0f} s", flush=True)
        results.append(_run(stage, seconds, logs / f"{stage.name.replace(' ', '-')}.log", grace))
        print(f"  {results[-1].status} after {results[-1].seconds:.0f} s: {results[-1].said}", flush=True)
    return results


def _run(stage: Stage, seconds: float, log: Path, grace: float) -> Result:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    begin = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *stage.command(seconds / 60)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it starts is ended with it
        )
        try:
            status = "ok" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            os.killpg(process.pid, signal.SIGINT)  # pytest and the benchmarks write down what they have
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            _kill_group(process)
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return Result(stage.name, time.monotonic() - begin, status, said[-1].strip() if said else "")


def _kill_group(process: subprocess.Popen) -> None:
    """The process, if it is still there, and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(results: Sequence[Result], rows: Sequence[Row]) -> str:
    """A line per stage: how it ended, and our first figure of it or what it said last."""
    lines = []
    for result in results:
        contestant, metric = HEADLINES.get(result.name, ("", ""))
        found = [
            row
            for row in rows
            if (row["question"], row["contestant"], row["metric"]) == (result.name, contestant, metric)
        ]
        figure = "{shape}: {metric} {value} {unit}".format(**found[0]).strip() if found else result.said
        lines.append([result.name, result.status, f"{result.seconds:.0f}", figure])
    return markdown.table(["stage", "", "seconds", ""], lines)


def main(argv: Sequence[str] | None = None) -> None:
    use_one_device()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--peers", action="store_true", help="beside other packages too, those that are installed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here; without one: make test, and python -m benchmarks --device cpu")
    started = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    print(f"{device_name('cuda')}, torch {torch.__version__}, {options.minutes:g} minutes", flush=True)
    out = options.out.resolve()
    results = run(stages(out, options.peers), options.minutes, out / "gpu-logs")
    rows = [row for row in read(out / "cuda.csv") if row["time"] >= started]
    print(f"\n{table(results, rows)}\n\nResults: {out / 'cuda.csv'}; what each stage printed: {out / 'gpu-logs'}")
    sys.exit(any(result.status == "failed" for result in results))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would stages
    main()
