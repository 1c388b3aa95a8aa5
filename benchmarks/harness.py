"""Timing and memory, measured side by side: contestants take turns in one process, and a row remembers where it ran."""

import csv
import gc
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "question", "shape", "contestant", "metric", "value", "low", "high", "unit",
    "device", "torch", "triton", "peer", "commit", "time",
)  # fmt: skip


class Table:
    """Rows of results, printed as they come and written to a CSV file at the end."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.rows: list[dict[str, str]] = []

    def add(self, question, shape, contestant, metric, value, unit, low=None, high=None, peer="") -> None:
        number = lambda x: "" if x is None else f"{x:.4g}"  # noqa: E731
        stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
        values = (
            question, shape, contestant, metric, number(value), number(low), number(high), unit,
            device_name(self.device), installed("torch"), installed("triton"), peer, _commit(), stamp,
        )  # fmt: skip
        self.rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
        spread = "" if low is None else f"   ({low:.4g} … {high:.4g})"
        print(f"{question:10}{shape:28}{contestant:22}{metric:24}{value:10.4g} {unit}{spread}", flush=True)

    def write(self, folder: Path) -> Path:
        """Replace the rows of the questions asked now in <folder>/<device>.csv, keep the others."""
        path = folder / f"{self.device}.csv"
        asked = {row["question"] for row in self.rows}
        kept = [row for row in read(path) if row["question"] not in asked] if path.exists() else []
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept + self.rows)
        return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def take_turns(
    contestants: dict[str, Callable[[], object]], device: str, repeats: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; the order rotates, so that no one always runs after the same one."""
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warm_up + repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            _synchronize(device)
            start = time.perf_counter()
            contestants[name]()
            _synchronize(device)
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: list[float], base: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratio within each round: a slow round slows both."""
    ratios = sorted(a / b for a, b in zip(seconds, base, strict=True))
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return statistics.median(ratios), quartiles[0], quartiles[2]


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Most memory in use while `function` runs, above what was in use before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts again from now
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0].split(':')[1].strip() if models else 'CPU'}, {torch.get_num_threads()} threads"


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    run = lambda *args: subprocess.run([*git, *args], capture_output=True, text=True).stdout.strip()  # noqa: E731
    dirty = run("status", "--porcelain", "--untracked-files=no", "--", ":!results")
    return (run("rev-parse", "--short", "HEAD") or "unknown") + ("+" if dirty else "")
