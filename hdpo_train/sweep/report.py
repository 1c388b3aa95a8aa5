"""The report of a sweep: tables, tests and plots of what α does, and of what temperature alone does.

Every figure is one evaluation's, and every interval is over seeds: Student's t, 95 %. Differences are taken seed by
seed, between runs that start from the same model and pairs and see them in the same order.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from hdpo_train.evaluation.report import drawn
from hdpo_train.evaluation.scores import Evaluation, Scores, from_json, read_json
from hdpo_train.files import write_whole
from hdpo_train.markdown import table
from hdpo_train.sweep.significance import Interval, Trend, interval, page_trend, paired

REPORT_FILE, PLOT_FILE, RESULTS_FILE = "sweep.md", "sweep.png", "results.json"


class Sweep(NamedTuple):
    """The evaluations of a sweep."""

    title: str
    per_seed: bool  # whether every seed has a model before training and pairs of its own
    base: list[Evaluation]  # before training: of every seed, or the one that all have in common
    runs: dict[float, list[Evaluation]]  # α -> of every seed; 1.0 among them, at more temperatures than 1

    @property
    def seeds(self) -> int:
        return len(self.runs[1.0])

    def save(self, path: Path) -> None:
        runs = {str(alpha): [asdict(each) for each in seeds] for alpha, seeds in self.runs.items()}
        text = json.dumps({**self._asdict(), "base": [asdict(each) for each in self.base], "runs": runs})
        write_whole(path, text + "\n")

    @classmethod
    def load(cls, path: Path) -> "Sweep":
        """Raises OSError, or ValueError for a file that is damaged."""

        def sweep(data: dict[str, Any]) -> Sweep:
            runs = {float(alpha): [from_json(each) for each in seeds] for alpha, seeds in data["runs"].items()}
            return cls(**{**data, "base": [from_json(each) for each in data["base"]], "runs": runs})

        return read_json(path, sweep)


class Metric(NamedTuple):
    name: str
    unit: str  # "%" is shown times 100
    digits: int
    of: Callable[[Evaluation, float], Any]  # at a temperature: a float, or None where it was not measured

    def show(self, value: float, sign: str = "") -> str:
        return f"{value:{sign}.{self.digits}f}{self.unit}"


def metrics(sweep: Sweep) -> dict[str, Metric]:
    """The metrics that were measured on every model, by name."""
    example = sweep.runs[1.0][0].sampled[1.0]
    found = [
        Metric("greedy accuracy", " %", 1, lambda e, _: None if e.greedy is None else 100 * e.greedy.accuracy.value),
        _sampled("sampled accuracy", " %", 1, lambda s: 100 * s.accuracy.value),
        *(_pass_at(k) for k in example.pass_at if k > 1),
        _sampled("distinct right", "", 2, lambda s: s.distinct_right.value),
        *(_distinct_n(n) for n in example.distinct_n),
        _sampled("self-BLEU", "", 3, lambda s: s.self_bleu and s.self_bleu.value),
        _sampled("entropy", "", 3, lambda s: s.entropy and s.entropy.value),
    ]
    everything = [each for evaluations in (sweep.base, *sweep.runs.values()) for each in evaluations]
    everywhere = [(each, temperature) for each in everything for temperature in each.sampled]
    return {m.name: m for m in found if None not in [m.of(*place) for place in everywhere]}


def _pass_at(k: int) -> Metric:
    return _sampled(f"pass@{k}", " %", 1, lambda s: 100 * s.pass_at[k].value)


def _distinct_n(n: int) -> Metric:
    return _sampled(f"distinct-{n}", "", 3, lambda s: s.distinct_n[n].value if n in s.distinct_n else None)


def _sampled(name: str, unit: str, digits: int, of: Callable[[Scores], Any]) -> Metric:
    return Metric(name, unit, digits, lambda evaluation, temperature: of(evaluation.sampled[temperature]))


def values(evaluations: Sequence[Evaluation], metric: Metric, temperature: float = 1.0) -> list[float]:
    """One a seed."""
    return [metric.of(each, temperature) for each in evaluations]


def against_dpo(sweep: Sweep, metric: Metric) -> dict[float, Interval]:
    """α -> its difference to α = 1, seed by seed. Needs two seeds."""
    dpo = values(sweep.runs[1.0], metric)
    return {a: paired(values(seeds, metric), dpo) for a, seeds in sweep.runs.items() if a != 1}


def entropy_trend(sweep: Sweep) -> Trend:
    """Does the entropy after training rise with α? Seeds are the blocks."""
    columns = [values(sweep.runs[alpha], metrics(sweep)["entropy"]) for alpha in sorted(sweep.runs)]
    return page_trend(list(zip(*columns, strict=True)))


class Match(NamedTuple):
    """A run beside the α = 1 model of its seed at the temperature where both have the same entropy."""

    temperature: float
    differences: dict[str, float]  # metric -> run − α = 1 at that temperature


def match_temperature(run: Evaluation, dpo: Evaluation, compared: Sequence[Metric], entropy: Metric) -> Match | None:
    """Between measured temperatures all figures of the α = 1 model are interpolated linearly in its entropy.

    None where the run's entropy is outside of what the temperatures cover.
    """
    target = entropy.of(run, 1.0)
    points = sorted((entropy.of(dpo, temperature), temperature) for temperature in dpo.sampled)
    for (low, cold), (high, hot) in itertools.pairwise(points):
        if low <= target <= high and low < high:
            share = (target - low) / (high - low)

            def between(a: float, b: float, share: float = share) -> float:
                return a + share * (b - a)

            differences = {
                metric.name: metric.of(run, 1.0) - between(metric.of(dpo, cold), metric.of(dpo, hot))
                for metric in compared
            }
            return Match(between(cold, hot), differences)
    return None


def frontier_metrics(sweep: Sweep) -> list[Metric]:
    """What α is compared in with temperature: sampled accuracy, pass@k of the largest k, distinct right answers."""
    found = metrics(sweep)
    most = [name for name in found if name.startswith("pass@")][-1:]
    return [found[name] for name in ("sampled accuracy", *most, "distinct right")]


def against_temperature(sweep: Sweep) -> dict[float, list[Match | None]]:
    """α -> seed by seed; without α = 1."""
    compared, entropy = frontier_metrics(sweep), metrics(sweep)["entropy"]
    return {
        alpha: [match_temperature(run, dpo, compared, entropy) for run, dpo in zip(seeds, sweep.runs[1.0], strict=True)]
        for alpha, seeds in sweep.runs.items()
        if alpha != 1
    }


def verdict(difference: Interval, better: str = "better", worse: str = "worse") -> str:
    if not difference.excludes_zero:
        return "not distinguishable"
    return better if difference.mean > 0 else worse


def write(sweep: Sweep, folder: Path) -> str:
    """sweep.md, sweep.png and results.json, the figures of both; the text."""
    sweep.save(folder / RESULTS_FILE)
    text = f"# α sweep: {sweep.title}\n\n{markdown(sweep)}\n"
    write_whole(folder / REPORT_FILE, text)
    if drawn(draw, sweep, folder / PLOT_FILE):
        text += f"\n![{PLOT_FILE}]({PLOT_FILE})\n"
        write_whole(folder / REPORT_FILE, text)
    return text


def markdown(sweep: Sweep) -> str:
    """All of the report but title and plot."""
    parts = [_introduction(sweep), figures_table(sweep)]
    others = len(sweep.runs) > 1
    if sweep.seeds > 1 and others:
        parts += ["## Against α = 1", differences_table(sweep)]
    if "entropy" in metrics(sweep):
        parts += ["## Can temperature alone do it?", temperatures_table(sweep)]
        parts += [frontier_table(sweep)] if sweep.seeds > 1 and others else []
    parts += ["## In words", "\n".join(f"- {sentence}" for sentence in conclusions(sweep))]
    return "\n\n".join(parts)


def _introduction(sweep: Sweep) -> str:
    first = sweep.runs[1.0][0]
    n = first.sampled[1.0].num_samples
    seeds = (
        f"Mean of {sweep.seeds} seeds ± half the 95 % confidence interval of that mean (Student's t over seeds). "
        if sweep.seeds > 1
        else "One seed: no interval. "
    )
    varied = (
        "A seed has its own model before training, its own pairs and held-out prompts: intervals are of the whole "
        "pipeline."
        if sweep.per_seed
        else "Seeds differ in the order of the data and in what is sampled, and have model and pairs in common: "
        "intervals are of this training, not of another model or data set."
    )
    return (
        f"H-DPO with several α from the same model and pairs; α = 1 is DPO. {first.num_prompts} prompts, {n} "
        f"samples of each at temperature 1. {seeds}{varied} Distinct right: different right answers among {n} samples. "
        "Entropy: nats per token, of the distribution sampled from."
    )


def _cell(figures: Sequence[float], metric: Metric) -> str:
    if len(figures) < 2:
        return metric.show(figures[0]) if figures else ""
    mean = interval(figures)
    return f"{metric.show(mean.mean).removesuffix(metric.unit)} ± {metric.show(mean.half_width)}"


def figures_table(sweep: Sweep, names: Sequence[str] = ()) -> str:
    """α by metric; names: of these alone."""
    found = [metric for metric in metrics(sweep).values() if not names or metric.name in names]
    lines = [["before training", *(_cell(values(sweep.base, metric), metric) for metric in found)]]
    for alpha, seeds in sorted(sweep.runs.items()):
        name = "α = 1 (DPO)" if alpha == 1 else f"α = {alpha:g}"
        lines.append([name, *(_cell(values(seeds, metric), metric) for metric in found)])
    return table(["", *(metric.name for metric in found)], lines)


def differences_table(sweep: Sweep) -> str:
    """The difference to α = 1, for each α and metric."""
    found = metrics(sweep).values()
    differences = {metric.name: against_dpo(sweep, metric) for metric in found}
    lines = [
        [f"α = {alpha:g}", *(_difference(differences[metric.name][alpha], metric) for metric in found)]
        for alpha in sorted(sweep.runs)
        if alpha != 1
    ]
    note = (
        "Differences to α = 1, seed by seed, ± half their 95 % confidence interval; bold where it excludes zero (by "
        f"chance, in one of twenty comparisons where there is no difference; here are {len(lines) * len(found)})."
    )
    return f"{table(['', *(metric.name for metric in found)], lines)}\n\n{note}"


def _difference(difference: Interval, metric: Metric) -> str:
    text = f"{metric.show(difference.mean, '+').removesuffix(metric.unit)} ± {metric.show(difference.half_width)}"
    return f"**{text}**" if difference.excludes_zero else text


def temperatures_table(sweep: Sweep) -> str:
    """The baseline: the α = 1 models at every temperature."""
    dpo = sweep.runs[1.0]
    found = [metrics(sweep)["entropy"], *frontier_metrics(sweep)]
    lines = [
        [f"T = {temperature:g}", *(_cell(values(dpo, metric, temperature), metric) for metric in found)]
        for temperature in sorted(dpo[0].sampled)
    ]
    return table(["α = 1, sampled at", *(metric.name for metric in found)], lines)


def frontier_table(sweep: Sweep) -> str:
    """Every α beside α = 1 at equal entropy."""
    lines = []
    for alpha, matches in sorted(against_temperature(sweep).items()):
        found = [match for match in matches if match]
        cells = [f"α = {alpha:g}", f"{len(found)} of {sweep.seeds}"]
        cells.append(f"{statistics.fmean(match.temperature for match in found):.2f}" if found else "")
        for metric in frontier_metrics(sweep):
            differences = [match.differences[metric.name] for match in found]
            cells.append(_difference(interval(differences), metric) if len(found) == sweep.seeds else "")
        lines.append(cells)
    header = ["at temperature 1", "seeds compared", "equal entropy at T", *(m.name for m in frontier_metrics(sweep))]
    note = (
        "Each α at temperature 1, less the α = 1 model of the same seed at the temperature that gives it the same "
        "entropy (linear interpolation between the temperatures above); ± and bold as before. An α whose entropy lies "
        "outside of what the temperatures reach, for any seed, is not compared."
    )
    return f"{table(header, lines)}\n\n{note}"


def conclusions(sweep: Sweep) -> list[str]:
    """What the figures say, in sentences."""
    found = metrics(sweep)
    if sweep.seeds < 2:
        return ["One seed shows no difference that another might not turn around: --seeds 3 or more for conclusions."]
    if len(sweep.runs) < 2:
        return ["There is only α = 1: nothing to compare it with."]
    sentences = []
    if "entropy" in found:
        sentences.append(trend_sentence(sweep))
    for name in [name for name in ("greedy accuracy", *(m.name for m in frontier_metrics(sweep))) if name in found]:
        differences = against_dpo(sweep, found[name])
        groups: dict[str, list[str]] = {}
        for alpha, difference in sorted(differences.items()):
            groups.setdefault(verdict(difference, "higher", "lower"), []).append(f"{alpha:g}")
        verdicts = [f"{what} with α = {', '.join(alphas)}" for what, alphas in groups.items()]
        sentences.append(f"{name.capitalize()}, compared with α = 1: {'; '.join(verdicts)}.")
    if "entropy" in found:
        sentences += temperature_sentences(sweep)
    return sentences


def trend_sentence(sweep: Sweep) -> str:
    trend = entropy_trend(sweep)
    says = "rises with α" if trend.p_value <= 0.05 else "is not shown to rise with α"
    return (
        f"Entropy after training {says}: Page's trend test, L = {trend.statistic:g}, p = {trend.p_value:.2g} "
        f"(one-sided, exact over all orders of {len(sweep.runs)} α in {sweep.seeds} seeds)."
    )


def temperature_sentences(sweep: Sweep) -> list[str]:
    sentences = []
    for alpha, matches in sorted(against_temperature(sweep).items()):
        found = [match for match in matches if match]
        if len(found) < sweep.seeds:
            sentences.append(
                f"α = {alpha:g} is not compared with temperature: for {sweep.seeds - len(found)} of {sweep.seeds} "
                "seeds its entropy lies outside of what the temperatures reach."
            )
            continue
        words = []
        for metric in frontier_metrics(sweep):
            difference = interval([match.differences[metric.name] for match in found])
            words.append(f"{metric.name} {verdict(difference)} ({_difference(difference, metric).strip('*')})")
        sentences.append(f"α = {alpha:g} against temperature scaling of α = 1 at equal entropy: {', '.join(words)}.")
    return sentences


def draw(sweep: Sweep, path: Path) -> None:
    """Above: metrics against α. Below: α at temperature 1 beside α = 1 under temperatures.

    Seeds of their own models differ by far more than α does in one of them: bars are of differences to α = 1.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    found = metrics(sweep)
    figure = Figure(figsize=(17, 8.5), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    above, below = halves
    bars = f"\nmean of {sweep.seeds} seeds (thin: each); bars: 95 % interval of the difference to α = 1, seed by seed"
    title = f"What α does ({sweep.title})" + bars * (sweep.seeds > 1)
    above.suptitle(title, parse_math=False)  # the names of files may hold dollar signs
    below.suptitle("Can temperature alone do it? Points: α at temperature 1. Curve: α = 1 at temperatures")
    passes = [name for name in found if name.startswith("pass@")]
    panels = [["greedy accuracy", "sampled accuracy"], passes, ["distinct right"], ["entropy"]]
    panels = [known for names in panels if (known := [name for name in names if name in found])]
    for axis, names in zip(above.subplots(1, len(panels)), panels, strict=True):
        _against_alpha(axis, sweep, [found[name] for name in names])
    diversities = [found[name] for name in ("entropy", "distinct right") if name in found]
    qualities = frontier_metrics(sweep)[:2]
    pairs = [(x, y) for x in diversities for y in qualities if x.name != y.name]
    for axis, (x, y) in zip(below.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        _frontier(axis, sweep, x, y)
    figure.savefig(path, dpi=110)


def _against_alpha(axis: Any, sweep: Sweep, shown: Sequence[Metric]) -> None:
    alphas = sorted(sweep.runs)
    for color, metric in enumerate(shown):
        means, errors = zip(*(_point(sweep, alpha, metric) for alpha in alphas), strict=True)
        for seed in zip(*(values(sweep.runs[alpha], metric) for alpha in alphas), strict=True):
            axis.plot(alphas, seed, color=f"C{color}", lw=0.5, alpha=0.4)
        axis.errorbar(alphas, means, yerr=errors, fmt="o-", color=f"C{color}", capsize=3, label=metric.name)
        before = statistics.fmean(values(sweep.base, metric))
        label = "before training" if color == len(shown) - 1 else None
        axis.axhline(before, color=f"C{color}", ls=":", lw=1.2, label=label)
    axis.set_xlabel("α")
    axis.set_ylabel(", ".join(metric.name for metric in shown) + shown[0].unit.replace(" %", ", %"))
    _finish(axis)


def _frontier(axis: Any, sweep: Sweep, x: Metric, y: Metric) -> None:
    dpo = sweep.runs[1.0]
    mean = lambda metric, temperature: statistics.fmean(values(dpo, metric, temperature))  # noqa: E731
    curve = [(mean(x, temperature), mean(y, temperature), temperature) for temperature in sorted(dpo[0].sampled)]
    axis.plot([p[0] for p in curve], [p[1] for p in curve], ".-", color="0.5", label="α = 1 at temperatures")
    for across, up, temperature in (curve[0], curve[-1]):
        axis.annotate(f"T = {temperature:g}", (across, up), textcoords="offset points", xytext=(4, 4), color="0.4")
    for color, alpha in enumerate(sorted(sweep.runs)):
        across, x_error = _point(sweep, alpha, x)
        up, y_error = _point(sweep, alpha, y)
        axis.errorbar(
            across, up, xerr=x_error, yerr=y_error, fmt="o", color=f"C{color}", capsize=2, label=f"α = {alpha:g}"
        )
    axis.set_xlabel(x.name + (", nats per token" if x.name == "entropy" else ""))
    axis.set_ylabel(y.name + y.unit.replace(" %", ", %"))
    _finish(axis)


def _point(sweep: Sweep, alpha: float, metric: Metric) -> tuple[float, float]:
    """Mean over seeds, and half the interval of its difference to α = 1."""
    mean = statistics.fmean(values(sweep.runs[alpha], metric))
    if alpha == 1 or sweep.seeds < 2:
        return mean, 0.0
    return mean, against_dpo(sweep, metric)[alpha].half_width


def _finish(axis: Any) -> None:
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
