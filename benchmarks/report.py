"""Draw the plots of benchmarks/results, and write the tables in README.md and docs/: python -m benchmarks.report"""

import ast
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import growth, longest, plots, sampled, train_step
from benchmarks.contest import OUR_RATIO
from benchmarks.contestants import CONTESTANTS, NAIVE, OURS, rank
from benchmarks.real import report as real
from benchmarks.table import RESULTS, Row, natural, read
from hdpo_train import markdown, of_trl

ROOT = Path(__file__).parent.parent
SECTIONS = ("benchmarks", "sampled")
STUDY = Path(__file__).parent / "study"
DOCUMENTS = (ROOT / "README.md", ROOT / "hdpo_kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PACKAGES = ("hdpo_kernels", "hdpo_train")
REAL = {"real": real.short, "real-long": real.long, "real-sampled": real.sampled}


class Pivot(NamedTuple):
    """A table of one question: a line per shape, a column per contestant."""

    question: str
    title: str
    metrics: tuple[str, ...]  # a cell shows the first of them that was measured


PIVOTS = (
    Pivot("loss", "Forward + backward: our time, and its ratio to that of", (OUR_RATIO, "time")),
    Pivot("forward", "Forward only: our time, and its ratio to that of", (OUR_RATIO, "time")),
    Pivot("small", "Small calls, forward + backward: our time, and its ratio to that of", (OUR_RATIO, "time")),
    Pivot("memory", "One pair, forward + backward: peak memory above inputs and gradients", ("peak memory",)),
    Pivot("accuracy", "Log-prob of a sequence: largest error against fp64", ("log-prob of a sequence",)),
    Pivot("train_step", "One optimizer step, end to end: our speed, and our time over that of", (OUR_RATIO, "speed")),
    Pivot("train_step", "The same: peak memory above model and data", ("peak memory",)),
    Pivot(
        "train_step",
        "The same: `linear_logp` in TRL's trainer, its time (on a CPU its CPU time) over that of TRL alone",
        (train_step.OVER_TRL.format("CPU time"), train_step.OVER_TRL.format("time")),
    ),
    Pivot(
        "growth",
        "One step of one long pair: our peak memory above model and data, and its ratio to that of (powers: of each)",
        (train_step.OUR_MEMORY_RATIO, "peak memory", growth.POWER.format("peak memory")),
    ),
    Pivot(
        "growth",
        "The same: our time (on a CPU its CPU time), and its ratio to that of (powers: of each)",
        (train_step.OUR_CPU_RATIO, "CPU time", OUR_RATIO, "time", *map(growth.POWER.format, ("CPU time", "time"))),
    ),
    Pivot(
        "longest",
        "Longer sequence of the longest pair of which one step fits: ours, and how many times that of",
        (longest.OUR_RATIO, "longest sequence"),
    ),
)


# Columns of the sampled gradient's table: title, contestant (of the line's ε, if it has one), metrics.
_ERRORS = ("d_hidden, relative", "d_weight, relative")
SAMPLED_COLUMNS = (
    ("time / one GEMM", sampled.SAMPLED, (sampled.over(sampled.GEMM),)),
    ("/ exact", sampled.SAMPLED, (sampled.over(OURS),)),
    ("/ naive", sampled.SAMPLED, (sampled.over(NAIVE),)),
    ("cce / one GEMM", "cce", (sampled.over(sampled.GEMM),)),
    ("peak memory", sampled.SAMPLED, ("peak memory",)),
    ("of exact", OURS, ("peak memory",)),
    ("entries per row / bound", sampled.SAMPLED, ("entries per row", "bound on entries of a row")),
    ("off, d_hidden / d_weight", sampled.SAMPLED, _ERRORS),
    ("filtered at ε", sampled.FILTERED, _ERRORS),
    ("cce", "cce", _ERRORS),
    ("exact", OURS, _ERRORS),
)


def tables(rows: Sequence[Row]) -> str:
    """Markdown of all rows; what nobody measured is not there."""
    blocks = [block for pivot in PIVOTS for block in _table(rows, pivot)]
    blocks += _sampled_table(rows)
    measured = {row["contestant"]: row["peer"] for row in rows if row["metric"]}
    legend = [
        f"{contestant.name}{' ' + measured[contestant.name] if measured[contestant.name] else ''}: {contestant.note}"
        for contestant in CONTESTANTS
        if contestant.name in measured and contestant.name != OURS
    ]
    return "\n\n".join([*blocks, ". ".join(legend) + "."] if legend else blocks)


def _table(rows: Sequence[Row], pivot: Pivot) -> list[str]:
    """A table, and a line that says why contestants without any figure have none."""
    rows = [row for row in rows if row["question"] == pivot.question]
    figures = {
        (row["shape"], row["contestant"]): _figure(row)
        for metric in reversed(pivot.metrics)  # the first one last, so that it stays
        for row in rows
        if row["metric"] == metric
    }
    statuses = {(row["shape"], row["contestant"]): row["status"] for row in rows if row["status"]}
    if not figures:
        return []
    columns = sorted({contestant for _, contestant in figures}, key=rank)
    lines = []
    for shape in sorted({shape for shape, _ in figures}, key=natural):
        cells = [figures.get((shape, name)) or statuses.get((shape, name), "").split(":")[0] for name in columns]
        lines.append([shape, *cells])
    return [markdown.table([pivot.title, *columns], lines), *_reasons(rows, columns)]


def _reasons(rows: Sequence[Row], shown: Iterable[str]) -> list[str]:
    """A line that says why contestants without any figure have none, if there are any."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        name, status = row["contestant"], row["status"]
        if status and name not in shown and status not in reasons.setdefault(name, []):
            reasons[name].append(status)
    without = ". ".join(f"{name or rows[0]['question']}: {'; '.join(each)}" for name, each in reasons.items())
    return [f"No figures: {without}."] if without else []


def _sampled_table(rows: Sequence[Row]) -> list[str]:
    """A line per shape, for the first ε that was measured on it; columns without any figure are not there."""
    rows = [row for row in rows if row["question"] == "sampled"]
    figures = {(row["shape"], row["contestant"], row["metric"]): _figure(row) for row in rows if row["metric"]}
    measured = {(shape, contestant) for shape, contestant, _ in figures}
    lines: dict[str, int] = {}  # shape: exponent of ε
    for shape in sorted({row["shape"] for row in rows}, key=natural):
        for exponent in sampled.EXPONENTS:
            if (shape, sampled.SAMPLED.format(exponent)) in measured:
                lines.setdefault(shape, exponent)
    table = [["Sampled gradient, forward + backward", *lines], ["ε", *(f"2^{exponent}" for exponent in lines.values())]]
    for title, contestant, metrics in SAMPLED_COLUMNS:
        cells = [
            " / ".join(figures.get((shape, contestant.format(exponent), metric), "") for metric in metrics)
            for shape, exponent in lines.items()
        ]
        if any(cell.strip(" /") for cell in cells):
            table.append([title, *(cell if cell.strip(" /") else "" for cell in cells)])
    if len(table) == 2:
        return []
    header, *body = zip(*table, strict=True)
    names = {contestant for _, contestant in measured}
    legend = (
        "Of the sampled gradient at ε, one draw; off: relative error against fp64. Filtered: plain PyTorch whose "
        "gradient lacks every probability below ε but the label's."
    )
    return [markdown.table(header, body), " ".join([legend, *_reasons(rows, names)])]


def _figure(row: Row) -> str:
    spread = f" ({_number(row['low'])} … {_number(row['high'])})" if row["low"] else ""
    return f"{_number(row['value'])} {row['unit']}{spread}".rstrip()


def _number(text: str) -> str:
    value = float(text)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def section(name: str, folder: Path = RESULTS) -> str:
    """What every device has measured: of the sampled gradient, or of everything else. Links are those of a folder."""
    blocks = []
    for device in ("cpu", "cuda"):
        rows = [row for row in read(folder / f"{device}.csv") if (row["question"] == "sampled") == (name == "sampled")]
        if not rows:
            blocks.append(f"On {device.upper()}: not measured yet (`{_again(name, device)}`).")
            continue
        machines = " and ".join(dict.fromkeys(f"{row['device']}, torch {row['torch']}" for row in rows))
        commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
        day = max(row["time"] for row in rows)[:10]
        plotted = ", ".join(
            f"[{png.stem.removeprefix(f'{device}-')}](../benchmarks/results/{png.name})"
            for png in sorted(folder.glob(f"{device}-*.png"))
            if (png.stem == f"{device}-sampled") == (name == "sampled")
        )
        blocks += [
            f"{machines}; commit {commits}, {day}. Medians (quartiles). Plots: {plotted or 'none'}. All rows: "
            f"`benchmarks/results/{device}.csv`; again: `{_again(name, device)}`.",
            tables(rows),
        ]
    return "\n\n".join(blocks)


def _again(name: str, device: str) -> str:
    return f"python -m benchmarks --device {device}" + " --only sampled" * (name == "sampled")


def study(folder: Path = STUDY) -> str:
    """The beginning of each study's report, without its title; links are those of a file in docs/."""
    blocks = []
    for name, command in (("study", "python -m benchmarks.study"), ("larger", "python -m benchmarks.study --larger")):
        report = folder / f"{name}.md"
        if not report.exists():
            blocks.append(f"{'On CUDA' if name == 'larger' else 'On the CPU'}: not measured yet (`{command}`).")
            continue
        beginning = report.read_text(encoding="utf-8").split("\n## ")[0].split("\n", 1)[1].strip()
        beginning = beginning.replace(f"]({name}.png)", f"](../benchmarks/study/{name}.png)")
        blocks += [beginning, f"[The report](../benchmarks/study/{name}.md)."]
    return "\n\n".join(blocks)


def head(rows: Sequence[Row]) -> str:
    """The loss at the LM head beside others: time on the first shape that was measured, memory as pairs get longer."""
    times = [row for row in rows if row["question"] == "loss" and row["metric"] == OUR_RATIO]
    memory = [row for row in rows if row["question"] == "memory" and row["metric"] == "peak memory"]
    if not times or not memory:
        return "The loss at the LM head: not measured yet (`python -m benchmarks --device cpu`)."
    newest = max(memory, key=lambda row: row["time"])
    peaks = {(row["shape"], row["contestant"]): row for row in memory if row["commit"] == newest["commit"]}
    shapes = sorted({shape for shape, _ in peaks}, key=natural)
    ratios = {row["contestant"]: row for row in times if row["shape"] == times[0]["shape"]}
    lines = []
    for name, title in ((OURS, "hdpo_kernels"), (NAIVE, "plain PyTorch"), ("trl", "TRL"), ("liger", "Liger")):
        cells = [_rounded(peaks.get((shape, name))) for shape in shapes]
        version = peaks[shapes[-1], name]["peer"] if (shapes[-1], name) in peaks else ""
        lines.append([f"{title} {version}".rstrip(), _rounded(ratios.get(name)), *cells])
    sizes = shapes[0].split(", ")[0]
    title = f"Loss and gradients at the LM head ({sizes}, fp32, on a CPU)"
    pairs = [shape.removeprefix(f"{sizes}, ") for shape in shapes]
    return markdown.table([title, "our time / theirs", f"peak memory, {pairs[0]}", *pairs[1:]], lines)


def _rounded(row: Row | None) -> str:
    """Two digits of a ratio, no fraction of a MiB; empty for what was not measured."""
    if row is None:
        return ""
    value = float(row["value"])
    return f"{value:,.0f} {row['unit']}" if value >= 10 else f"{value:.2g} {row['unit']}"


def files() -> str:
    """Every module of both packages, with the first line of its docstring."""
    lines = []
    for package in PACKAGES:
        folder = None
        for path in sorted((ROOT / package).rglob("*.py"), key=lambda path: (path.parent, path)):
            about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            name = path.relative_to(ROOT)
            if name.parent != folder:
                folder = name.parent
                lines += ["", f"## {folder}/", ""]
            if about is not None:
                lines.append(f"- [{name.name}](../{name}): {about.splitlines()[0]}")
    return "\n".join(lines).strip()


def filled_in(text: str) -> str:
    """The text with every block between `<!-- NAME: begin -->` and `<!-- NAME: end -->` written anew.

    Names: those of SECTIONS and REAL, study, head, files, or that of a file results/NAME.md.
    """

    def content(marked: re.Match[str]) -> str:
        begin, name, end = marked.groups()
        file = RESULTS / f"{name}.md"
        if name in SECTIONS:
            new = section(name)
        elif name == "study":
            new = study()
        elif name == "head":
            new = head(read(RESULTS / "cpu.csv"))
        elif name == "files":
            new = files()
        elif name == "trl-options":
            new = of_trl.table()
        elif name in REAL:
            new = REAL[name](read(RESULTS / "real.csv"))
        else:
            new = file.read_text(encoding="utf-8").strip()
        return f"{begin}\n{new}\n{end}"

    return re.sub(r"(<!-- (\S+): begin -->)\n.*?(<!-- \2: end -->)", content, text, flags=re.DOTALL)


def main() -> None:
    for device in ("cpu", "cuda"):
        plots.draw(read(RESULTS / f"{device}.csv"), RESULTS, device)
    for document in DOCUMENTS:
        document.write_text(filled_in(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
