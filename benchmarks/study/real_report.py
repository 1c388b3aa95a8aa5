"""The report of the study on a real model: tables, claims with Holm's correction, and a picture."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.study.real import (
    CONDITIONS,
    CORE,
    DPO,
    EQUAL_BETA,
    GRID,
    MATCHED,
    METRICS,
    SEEDS,
    TEMPERATURES,
    UNTRAINED,
    Condition,
    Row,
    Settings,
)
from hdpo_train.markdown import table
from hdpo_train.sweep.significance import holm, interval, p_value

FEWEST = 3  # seeds of an interval
CLAIMED = ("sampled accuracy", "pass@k", "distinct right", "entropy")
DIGITS = {"distinct right": 2, "entropy": 2, "words": 1}  # of the others, in per cent, 1
Of = dict[int, Row]  # a seed's row


class Claim(NamedTuple):
    """values of a condition less those of a baseline, seed by seed."""

    condition: str
    baseline: str
    metric: str
    differences: list[float]


class Results:
    """Rows by condition, epoch and temperature; a claim is made of the seeds that both of its sides have."""

    def __init__(self, rows: Sequence[Row], epochs: int) -> None:
        self.rows, self.epochs = rows, epochs

    def of(self, condition: Condition, epoch: int, temperature: float = 1.0) -> Of:
        wanted = (condition.name, epoch, temperature)
        return {r["seed"]: r for r in self.rows if (r["condition"], r["epoch"], r["temperature"]) == wanted}

    def claims(self) -> list[Claim]:
        found: list[Claim] = []
        against = [(each, DPO) for each in CORE] + [*EQUAL_BETA.items()] + [(each, MATCHED[0]) for each in MATCHED[1:]]
        for epoch, (one, other) in itertools.product(sorted({1, self.epochs}), against):
            name = f"{one.name}, {_epochs(epoch)}"
            found += self._compare(name, self.of(one, epoch), other.name, self.of(other, epoch), CLAIMED)
        cooled = [self.of(DPO, self.epochs, temperature) for temperature in sorted((1.0, *TEMPERATURES))]
        stopped = [self.of(UNTRAINED, 0), *(self.of(DPO, epoch) for epoch in range(1, self.epochs + 1))]
        paths = {"DPO's temperature of equal entropy": cooled, "DPO stopped at equal entropy": stopped}
        for condition, (name, path), metric in itertools.product(CORE, paths.items(), CLAIMED[:-1]):
            ours = self.of(condition, self.epochs)
            theirs: dict[int, Row] = {}
            for seed, row in ours.items():
                value = at_equal_entropy([of[seed] for of in path if seed in of], row, metric)
                if value is not None:
                    theirs[seed] = {metric: value}
            found += self._compare(f"{condition.name}, {_epochs(self.epochs)}", ours, name, theirs, [metric])
        return [claim for claim in found if claim.differences]

    def _compare(self, name: str, ours: Of, baseline: str, theirs: Of, metrics: Iterable[str]) -> list[Claim]:
        seeds = sorted(ours.keys() & theirs.keys())
        return [Claim(name, baseline, m, [ours[s][m] - theirs[s][m] for s in seeds]) for m in metrics]


def at_equal_entropy(path: Sequence[Row], row: Row, metric: str) -> float | None:
    """The metric along a path of rows where its entropy is the row's, linear between two of them; the last crossing.

    None: the path does not reach that entropy.
    """
    for a, b in reversed(list(itertools.pairwise(path))):
        low, high = sorted((a["entropy"], b["entropy"]))
        if low <= row["entropy"] <= high and low < high:
            share = (row["entropy"] - a["entropy"]) / (b["entropy"] - a["entropy"])
            return float(a[metric] + share * (b[metric] - a[metric]))
    return None


def markdown(rows: Sequence[Row], settings: Settings, about: str, plot: str) -> str:
    results = Results(rows, settings.epochs)
    return "\n\n".join(
        [
            "# What α does to SmolLM2-135M-Instruct",
            f"One short sentence under one constraint that a program checks: {settings.pair_prompts} prompts a seed, "
            f"{settings.pair_samples} own answers each, at most two pairs of a prompt; evaluated on "
            f"{settings.held_out} prompts with other kinds of constraints, {settings.samples} samples each, pass@k "
            f"with k = {settings.samples}. All weights are trained, in bf16 autocast; β {settings.beta:g}, constant "
            f"learning rate {settings.learning_rate:g}, {settings.batch} pairs a step. {about}",
            _there(results),
            f"## Figures\n\nMeans ± half their 95 % interval (Student's t over seeds); fewer than {FEWEST} seeds: the "
            f"mean alone. Margin: (α − 1)β(ρ_w − ρ_l), α by token accordingly. Entropy: nats per token. "
            f"[Picture]({plot}).",
            _figures(results),
            "## Differences, seed by seed",
            _claims(results.claims()),
            "## α × β",
            _grid(results),
            f"![{plot}]({plot})",
        ]
    )


def _epochs(epoch: int) -> str:
    return f"{epoch} epoch{'s' * (epoch > 1)}"


def _there(results: Results) -> str:
    """Which runs there are, and which are missing."""
    seeds = {each: sorted(results.of(each, results.epochs if each.alpha else 0)) for each in CONDITIONS}
    missing = [f"{each.name} (seeds {', '.join(map(str, left))})" for each, has in seeds.items()
               if (left := [seed for seed in SEEDS if seed not in has])]  # fmt: skip
    missing += [f"{each.name} (seed {SEEDS[0]}, grid)" for each in GRID if not results.of(each, results.epochs)]
    done = sum(map(len, seeds.values())) + sum(bool(results.of(each, results.epochs)) for each in GRID)
    total = len(CONDITIONS) * len(SEEDS) + len(GRID)
    if not missing:
        return f"All {total} runs are there."
    return f"**{done} of {total} runs are there**; the same command goes on with the others: {'; '.join(missing)}."


def _shown(metric: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.{DIGITS[metric]}f}" if metric in DIGITS else f"{100 * value:{sign}.1f}"


def _cell(metric: str, values: Sequence[float]) -> str:
    text = _shown(metric, statistics.fmean(values))
    return f"{text} ± {_shown(metric, interval(values).half_width)}" if len(values) >= FEWEST else text


def _figures(results: Results) -> str:
    epochs, lines = results.epochs, []
    places = [(UNTRAINED, 0, 1.0), *((DPO, epoch, 1.0) for epoch in range(1, epochs + 1))]
    places += [(DPO, epochs, temperature) for temperature in TEMPERATURES]
    places += [
        (each, epoch, 1.0) for each in CONDITIONS if each not in (DPO, UNTRAINED) for epoch in sorted({1, epochs})
    ]
    for condition, epoch, temperature in places:
        if of := results.of(condition, epoch, temperature).values():
            margin = [row["margin"] for row in of if row["margin"] is not None]
            name = condition.name + f", T = {temperature:g}" * (temperature != 1)
            cells = [_cell(metric, [row[metric] for row in of]) for metric in METRICS]
            shown = f"{statistics.fmean(margin):+.2f}" if margin else ""
            lines.append([name, str(epoch), str(len(of)), *cells, shown])
    units = [metric if metric in DIGITS else f"{metric}, %" for metric in METRICS]
    return table(["", "epochs", "seeds", *units, "margin before training"], lines)


def _claims(claims: Sequence[Claim]) -> str:
    """Those with enough seeds are tested, as one family."""
    tested = [claim for claim in claims if len(claim.differences) >= FEWEST]
    if not tested:
        return f"No comparison has {FEWEST} seeds yet."
    found = [interval(claim.differences) for claim in tested]
    raw = [p_value(each.t, len(claim.differences) - 1) for each, claim in zip(found, tested, strict=True)]
    lines: dict[tuple[str, str], list[str]] = {}
    for claim, each, p in zip(tested, found, holm(raw), strict=True):
        text = f"{_shown(claim.metric, each.mean, '+')} ± {_shown(claim.metric, each.half_width)}"
        text = f"**{text}**" if each.excludes_zero else text
        line = lines.setdefault((claim.condition, claim.baseline), [""] * (1 + len(CLAIMED)))
        line[0] = str(len(claim.differences))
        line[1 + CLAIMED.index(claim.metric)] = text + f" (p {p:.2g})" * (p <= 0.05)
    note = (
        f"± half the 95 % interval; bold where it excludes zero by itself, which one in twenty does by chance; here "
        f"are {len(tested)}. In brackets p by Holm's correction for all of them, where it is at most 0.05: "
        f"{sum(p <= 0.05 for p in holm(raw))} are. At equal entropy: only seeds whose entropy DPO reaches."
    )
    units = [metric if metric in DIGITS else f"{metric}, points" for metric in CLAIMED]
    return f"{table(['', 'less', 'seeds', *units], [[*key, *line] for key, line in lines.items()])}\n\n{note}"


def _grid_rows(results: Results) -> dict[float, list[Row | None]]:
    """β's factor -> the first seed's row of every α of the grid, None where it was not run."""
    of = lambda alpha, beta: results.of(Condition(alpha, beta=beta), results.epochs).get(SEEDS[0])  # noqa: E731
    return {beta: [of(alpha, beta) for alpha in (0.7, 1, 1.4)] for beta in (0.3, 1.0, 3.0)}


def _cell_of_grid(row: Row | None) -> str:
    return f"{100 * row['sampled accuracy']:.1f} %, {row['entropy']:.2f}" if row else "not run"


def _grid(results: Results) -> str:
    lines = [[f"β × {beta:g}", *map(_cell_of_grid, rows)] for beta, rows in _grid_rows(results).items()]
    head = f"Seed {SEEDS[0]}, {_epochs(results.epochs)}: sampled accuracy, entropy."
    return f"{head}\n\n{table(['', *(f'α = {alpha}' for alpha in (0.7, 1, 1.4))], lines)}"


def draw(rows: Sequence[Row], epochs: int, path: Path) -> None:
    """Entropy across, a metric up: a colour a condition, small dots its seeds, large ones their mean; the grid."""
    from matplotlib.figure import Figure

    results = Results(rows, epochs)
    figure = Figure(figsize=(17, 5.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, metric in zip(axes[:2], ("sampled accuracy", "distinct right"), strict=True):
        for color, condition in enumerate([UNTRAINED, DPO, *CORE]):
            label: str | None = condition.name
            for epoch, marker in ((0, "s"), (1, "o"), (epochs, "^")):
                if of := list(results.of(condition, epoch).values()):
                    x, y = ([row[name] for row in of] for name in ("entropy", metric))
                    axis.plot(x, y, marker, color=f"C{color}", ms=4, alpha=0.35)
                    mean = statistics.fmean(x), statistics.fmean(y)
                    axis.plot(*mean, marker, color=f"C{color}", ms=11, label=label)
                    label = None
        cooled = [list(results.of(DPO, epochs, t).values()) for t in sorted((1.0, *TEMPERATURES))]
        mean_of: Callable[[str, list[Row]], float] = lambda name, of: statistics.fmean(row[name] for row in of)  # noqa: E731
        curve = [(mean_of("entropy", of), mean_of(metric, of)) for of in cooled if of]
        if curve:
            axis.plot(*zip(*curve, strict=True), ":", color="C1", label=f"DPO at temperatures, {_epochs(epochs)}")
        axis.set_xlabel("entropy, nats per token")
        axis.set_ylabel(metric)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    _draw_grid(axes[2], results)
    figure.suptitle(
        f"SmolLM2-135M-Instruct, short instructions: ■ before, ● 1 epoch, ▲ {_epochs(epochs)}; small: a seed"
    )
    figure.savefig(path, dpi=100)


def _draw_grid(axis: Any, results: Results) -> None:
    found = _grid_rows(results)
    axis.imshow([[row["sampled accuracy"] if row else math.nan for row in rows] for rows in found.values()])
    for (down, rows), across in itertools.product(enumerate(found.values()), range(3)):
        axis.text(across, down, _cell_of_grid(rows[across]), ha="center", bbox={"color": "w", "alpha": 0.7})
    axis.set_xticks(range(3), ["α = 0.7", "α = 1", "α = 1.4"])
    axis.set_yticks(range(3), [f"β × {beta:g}" for beta in found])
    axis.set_title(f"sampled accuracy and entropy, seed {SEEDS[0]}, {_epochs(results.epochs)}", fontsize=10)
