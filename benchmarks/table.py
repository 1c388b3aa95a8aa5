"""Rows of results, each with where, when and by what version it was measured, kept in a CSV file a device or study."""

import csv
import functools
import re
import subprocess
from collections.abc import Collection
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "question", "shape", "contestant", "metric", "value", "low", "high", "unit", "status",
    "device", "torch", "triton", "peer", "commit", "time",
)  # fmt: skip
Row = dict[str, str]


class Table:
    """Collects rows, prints them as they come, and puts them into the CSV file."""

    def __init__(self, device: str, name: str = "", digits: int = 4) -> None:
        """name: of the file, if not the device's; digits: significant ones of a figure."""
        self.device, self.name, self.digits = device, name or device, digits
        self.rows: list[Row] = []

    def add(
        self,
        question: str,
        shape: str,
        contestant: str,
        metric: str,
        values: tuple[float, ...],
        unit: str,
        package: str = "",
    ) -> None:
        """One figure: values are the figure alone, or median, lower and upper quartile. package: for its version."""
        numbers = dict(zip(("value", "low", "high"), (f"{value:.{self.digits}g}" for value in values), strict=False))
        self._append(question, shape, contestant, package, metric=metric, unit=unit, **numbers)
        spread = " ({low} … {high})".format(**numbers) if len(values) == 3 else ""
        print(f"{question:12}{shape:38} {contestant:18} {metric:24}{numbers['value']:>10} {unit}{spread}", flush=True)

    def add_status(self, question: str, shape: str, contestant: str, status: str, package: str = "") -> None:
        """Why a contestant has no figures."""
        self._append(question, shape, contestant, package, status=status)
        print(f"{question:12}{shape:38} {contestant:18} {status}", flush=True)

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.csv"

    def write(self, folder: Path, whole: Collection[str] = ()) -> None:
        """Replace the rows of what was measured now (question and shape) in <folder>/<name>.csv, keep the others.

        whole: questions that were measured on all of their shapes; rows of other shapes go.
        """
        path = self.path(folder)
        measured = {(row["question"], row["shape"]) for row in self.rows}
        kept = [
            row
            for row in read(path)
            if row["question"] not in whole and (row["question"], row["shape"]) not in measured
        ]
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept + self.rows)

    def _append(self, question: str, shape: str, contestant: str, package: str, **values: str) -> None:
        row = dict.fromkeys(COLUMNS, "")
        row.update(question=question, shape=shape, contestant=contestant, peer=installed(package), **values)
        row.update(device=device_name(self.device), torch=installed("torch"), triton=installed("triton"))
        row.update(commit=commit(), time=datetime.now(timezone.utc).isoformat(timespec="seconds"))
        self.rows.append(row)


def read(path: Path) -> list[Row]:
    """Rows of a CSV file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def natural(shape: str) -> list[tuple[int, str]]:
    """A key that sorts numbers inside a name by their size."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", shape)]


@functools.cache
def installed(package: str) -> str:
    """Version of a package, empty if it is not there."""
    try:
        return version(package) if package else ""
    except PackageNotFoundError:
        return ""


@functools.cache
def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0].split(':')[1].strip() if models else 'CPU'}, {torch.get_num_threads()} threads"


@functools.cache
def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    run = lambda *args: subprocess.run([*git, *args], capture_output=True, text=True).stdout.strip()  # noqa: E731
    dirty = run("status", "--porcelain", "--untracked-files=no", "--", ":!results", ":!study/*.md", ":!study/*.json")
    return (run("rev-parse", "--short", "HEAD") or "unknown") + ("+" if dirty else "")
