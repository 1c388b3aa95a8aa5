"""Plots of a device's results: time, memory against length, accuracy, the sampled gradient against ε."""

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global state, no display

from benchmarks.contestants import OURS, rank
from benchmarks.table import Row, natural

_COLORS = ["C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9", "navy"]  # neither our red nor the floors' gray
_PANELS = {"loss": "forward + backward", "forward": "forward only", "train_step": "one optimizer step"}


def draw(rows: Sequence[Row], folder: Path, device: str) -> list[Path]:
    """Write <device>-time.png, -memory.png, -growth.png, -accuracy.png, -sampled.png, those of what was measured."""
    paths = []
    panels = {"time": _time, "memory": _memory, "growth": _growth, "accuracy": _accuracy, "sampled": _sampled}
    for name, plot in panels.items():
        figure = plot(rows)
        if figure is not None:
            paths.append(folder / f"{device}-{name}.png")
            figure.savefig(paths[-1], dpi=120)
    return paths


def _time(rows: Sequence[Row]) -> Figure | None:
    """A panel per question and shape, a bar per contestant; whiskers are quartiles."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for question in _PANELS:
        for row in rows:
            if row["question"] == question and row["metric"] == "time":
                panels.setdefault((question, row["shape"]), []).append(row)
    if not panels:
        return None
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, ((question, shape), bars) in zip(axes, panels.items(), strict=False):
        bars.sort(key=lambda row: rank(row["contestant"]))
        names = [row["contestant"] for row in bars]
        values, low, high = ([float(row[key] or row["value"]) for row in bars] for key in ("value", "low", "high"))
        whiskers = [[abs(x - v) for v, x in zip(values, ends, strict=True)] for ends in (low, high)]
        axis.barh(names, values, xerr=whiskers, color=[_color(name) for name in names], ecolor="black")
        axis.invert_yaxis()
        axis.set_title(f"{shape}\n{_PANELS[question]}", fontsize=9)
        axis.set_xlabel("ms, median and quartiles", fontsize=8)
        _tidy(axis)
    return figure


def _memory(rows: Sequence[Row]) -> Figure | None:
    return _against_length(rows, "memory", {"peak memory": "peak above inputs and gradients, MiB"})


def _growth(rows: Sequence[Row]) -> Figure | None:
    time = "CPU time" if any(row["metric"] == "CPU time" for row in rows) else "time"
    labels = {"peak memory": "peak above model and data, MiB", time: f"{time} of a step, ms"}
    return _against_length([row for row in rows if ", prompt of" not in row["shape"]], "growth", labels)


def _against_length(rows: Sequence[Row], question: str, labels: dict[str, str]) -> Figure | None:
    """A panel per metric, a line per contestant over the length of a pair's longer sequence."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {metric: {} for metric in labels}
    for row in rows:
        length = re.search(r"(\d+)( \+ \d+)? tokens", row["shape"])
        if row["question"] == question and row["metric"] in lines and length:
            points = lines[row["metric"]].setdefault(row["contestant"], [])
            points.append((int(length[1]), float(row["value"])))
    if not any(lines.values()):
        return None
    figure = Figure(figsize=(6.4 * len(labels), 4.2), layout="constrained")
    for axis, (metric, curves) in zip(figure.subplots(1, len(labels), squeeze=False)[0], lines.items(), strict=True):
        for name in sorted(curves, key=rank):
            axis.plot(*zip(*sorted(curves[name]), strict=True), "o-", label=name, color=_color(name), markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        lengths = sorted({length for points in curves.values() for length, _ in points})
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
        axis.set_xlabel("tokens of the longer sequence of one pair")
        axis.set_ylabel(labels[metric])
        axis.legend(fontsize=8)
        _tidy(axis)
    return figure


def _accuracy(rows: Sequence[Row]) -> Figure | None:
    """A panel per quantity, a group of points per dtype, a point per contestant."""
    metrics = {
        "log-prob of a sequence": "nats off, log-prob of a sequence",
        "d_hidden, relative": "relative error, d_hidden",
        "d_weight, relative": "relative error, d_weight",
    }
    rows = [row for row in rows if row["question"] == "accuracy" and row["metric"] in metrics]
    if not rows:
        return None
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = sorted({row["contestant"] for row in rows}, key=rank)
    figure = Figure(figsize=(4.2 * len(metrics), 3.8), layout="constrained")
    for axis, (metric, label) in zip(figure.subplots(1, len(metrics)), metrics.items(), strict=True):
        for i, name in enumerate(names):
            points = [
                (shapes.index(row["shape"]) + 0.6 * ((i + 0.5) / len(names) - 0.5), float(row["value"]))
                for row in rows
                if (row["contestant"], row["metric"]) == (name, metric)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), "o", label=name, color=_color(name))
        axis.set_yscale("log")
        axis.set_xticks(range(len(shapes)), [shape.replace(", ", "\n") for shape in shapes], fontsize=8)
        axis.set_ylabel(label)
        _tidy(axis)
    shown = {line.get_label(): line for axis in figure.axes for line in axis.lines}
    figure.axes[-1].legend(handles=[shown[name] for name in names if name in shown], fontsize=8)
    return figure


def _sampled(rows: Sequence[Row]) -> Figure | None:
    """A column of panels per shape: error of d_hidden and time against ε, a level line for who has no ε."""
    metrics = {"d_hidden, relative": "relative error, d_hidden", "time": "ms, median and quartiles"}
    rows = [row for row in rows if row["question"] == "sampled" and row["metric"] in metrics]
    if not rows:
        return None
    shapes = sorted({row["shape"] for row in rows}, key=natural)
    figure = Figure(figsize=(3.4 * len(shapes), 5.6), layout="constrained")
    axes = figure.subplots(len(metrics), len(shapes), squeeze=False)
    for (metric, label), line in zip(metrics.items(), axes, strict=True):
        for shape, axis in zip(shapes, line, strict=True):
            _against_epsilon(axis, [row for row in rows if (row["shape"], row["metric"]) == (shape, metric)])
        line[0].set_ylabel(label, fontsize=8)
        line[-1].legend(fontsize=7)
    for shape, above, below in zip(shapes, *axes, strict=True):
        above.set_title(shape.replace(", ", "\n"), fontsize=9)
        above.set_yscale("log")
        above.set_ylim(bottom=max(above.get_ylim()[0], 1e-4))  # fp32's rounding is far below
        below.set_ylim(bottom=0)
    return figure


def _against_epsilon(axis: Axes, rows: Sequence[Row]) -> None:
    curves: dict[str, list[tuple[float, list[float]]]] = {}  # ε and the value, how far below and above it quartiles are
    for row in rows:
        name, value = row["contestant"], float(row["value"])
        if at := re.fullmatch(r"(\w+) 2\^(-\d+)", name):
            spread = [abs(float(row[key] or value) - value) for key in ("low", "high")]
            curves.setdefault(at[1], []).append((2.0 ** int(at[2]), [value, *spread]))
        else:
            axis.axhline(value, label=name, color=_color(name), linestyle="--", linewidth=1)
    for name, points in curves.items():
        epsilons, figures = zip(*sorted(points), strict=True)
        values, *spreads = zip(*figures, strict=True)
        color = "crimson" if name == "sampled" else "black"
        axis.errorbar(epsilons, values, spreads, fmt="o-", label=name, color=color, markersize=4)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("ε", fontsize=8)
    _tidy(axis)


def _color(name: str) -> str:
    if name in (OURS, "hdpo_train"):
        return "crimson"
    return "dimgray" if "GEMM" in name else _COLORS[rank(name) % len(_COLORS)]


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
