"""Evaluations to read: a table in Markdown, and plots."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hdpo_train.evaluation.scores import NGRAMS, SELF_BLEU_SAMPLES, Estimate, Evaluation, Scores
from hdpo_train.markdown import table

_STYLES = ("-", "--", ":", "-.")
Cell = Callable[[Scores], Estimate | None]


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """A row for each evaluation and temperature; columns that nothing is known of are left out. Ends with what they
    mean."""
    rows = [(each, scores) for each in evaluations for scores in _by_temperature(each)]
    ks = sorted({k for _, scores in rows for k in scores.pass_at} - {1})  # pass@1 is accuracy
    percent, three = "{:.1%}".format, "{:.3f}".format
    columns: dict[str, tuple[Cell, Callable[[float], str]]] = {
        "accuracy": (lambda s: s.accuracy, percent),
        **{f"pass@{k}": (lambda s, k=k: s.pass_at.get(k), percent) for k in ks},  # type: ignore[misc]
        "distinct right": (lambda s: s.distinct_right if s.num_samples > 1 else None, "{:.2f}".format),
        **{f"distinct-{n}": (lambda s, n=n: _distinct(s, n), three) for n in NGRAMS},  # type: ignore[misc]
        "self-BLEU": (lambda s: s.self_bleu, three),
        "entropy": (lambda s: s.entropy, three),
    }
    columns = {name: column for name, column in columns.items() if any(column[0](scores) for _, scores in rows)}
    lines = []
    for each, scores in rows:
        cells = [_cell(get(scores), form) for get, form in columns.values()]
        temperature = f"{scores.temperature:g}" if scores.temperature else "0 (greedy)"
        lines.append([each.name, temperature, str(scores.num_samples), *cells])
    notes = {
        "accuracy": "Accuracy: share of samples that are right.",
        "pass@": "pass@k: probability that one of k samples is right (unbiased).",
        "distinct right": "Distinct right: different right completions among a prompt's samples.",
        "distinct-": "distinct-n: different n-grams of words / all of them, over a prompt's samples.",
        "self-BLEU": f"self-BLEU: of a sample against the prompt's others (at most {SELF_BLEU_SAMPLES}), 0 … 1; lower "
        "is more diverse.",
        "entropy": "Entropy: exact, nats per generated token (a completion's end or stop string included), of the "
        "distribution sampled from; at temperature 0 that of the model itself, temperature 1, along the greedy path.",
    }
    meaning = [note for start, note in notes.items() if any(name.startswith(start) for name in columns)]
    prompts = ", ".join(str(number) for number in sorted({each.num_prompts for each in evaluations}))
    interval = (
        f"Prompts: {prompts}. In brackets 95 % bootstrap intervals over them: other prompts, not other seeds (one "
        "without width says only that these prompts are all alike)."
    )
    faults = [f"\n\n{each.name}: {line}." for each in evaluations if (line := each.faults())]
    figures = table(["", "temperature", "samples", *columns], lines)
    return figures + "\n\n" + " ".join([interval, *meaning]) + "".join(faults)


def drawn(draw: Callable[[Any, Path], None], results: Any, path: Path) -> bool:
    """Whether draw(results, path) could: without matplotlib there is no plot, and a line that says how to get it."""
    path.unlink(missing_ok=True)  # of an earlier call
    try:
        draw(results, path)
    except ImportError as error:
        print(
            f"{path} is not drawn: matplotlib cannot be imported ({error}). All other results are there; "
            "pip install 'hdpo[train]', and the same command draws it",
            file=sys.stderr,
        )
        return False
    return True


def draw(evaluations: Sequence[Evaluation], path: str | Path) -> None:
    """Accuracy against temperature, pass@k against k, diversity, entropy; with their intervals."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(12, 8), layout="constrained")
    accuracy, coverage, diversity, entropy = figure.subplots(2, 2).flat
    bars: list[tuple[str, dict, Scores]] = []
    for number, each in enumerate(evaluations):
        color, every = f"C{number % 10}", _by_temperature(each)
        points = [(scores.temperature, scores.accuracy) for scores in every]
        _line(accuracy, points, "-", color, each.name)
        sampled = [scores for scores in every if scores.temperature]
        for place, scores in enumerate(sampled):
            label = f"{each.name}, T = {scores.temperature:g}"
            _line(coverage, sorted(scores.pass_at.items()), _STYLES[place % len(_STYLES)], color, label)
            bars.append((label, {"color": color, "alpha": 1 - 0.7 * place / len(sampled)}, scores))
    measures: dict[str, Cell] = {f"distinct-{n}": lambda s, n=n: _distinct(s, n) for n in NGRAMS}  # type: ignore[misc]
    measures["self-BLEU"] = lambda s: s.self_bleu
    for number, (_, look, scores) in enumerate(bars):
        width = 0.8 / len(bars)
        for at, get in enumerate(measures.values()):
            _bar(diversity, at - 0.4 + (number + 0.5) * width, get(scores), width, look)
        _bar(entropy, number, scores.entropy, 0.8, look)
    diversity.set_xticks(range(len(measures)), list(measures))
    entropy.set_xticks(range(len(bars)), [label for label, _, _ in bars], rotation=20, ha="right", fontsize=8)
    titles = {
        accuracy: ("Accuracy", "temperature (0: greedy)"),
        coverage: ("pass@k", "k"),
        diversity: ("Diversity (self-BLEU: lower is more diverse)", ""),
        entropy: ("Entropy, nats per generated token", ""),
    }
    for axis, (title, label) in titles.items():
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def _by_temperature(evaluation: Evaluation) -> list[Scores]:
    greedy = [evaluation.greedy] if evaluation.greedy else []
    return greedy + [scores for _, scores in sorted(evaluation.sampled.items())]


def _distinct(scores: Scores, n: int) -> Estimate | None:
    """distinct-n, but not of a single sample: there it would only say how often that sample repeats itself."""
    return scores.distinct_n.get(n) if scores.num_samples > 1 else None


def _cell(estimate: Estimate | None, form: Callable[[float], str]) -> str:
    if estimate is None:
        return ""
    return f"{form(estimate.value)} ({form(estimate.low).rstrip('%')} … {form(estimate.high).rstrip('%')})"


def _line(axis, points, style: str, color: str, label: str) -> None:
    if points:
        x, estimates = zip(*points, strict=True)
        axis.plot(x, [e.value for e in estimates], f"o{style}", color=color, label=label)
        axis.fill_between(x, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.15, lw=0)


def _bar(axis, x: float, estimate: Estimate | None, width: float, look: dict) -> None:
    if estimate is not None:
        below, above = estimate.value - estimate.low, estimate.high - estimate.value
        error = [[max(below, 0)], [max(above, 0)]]  # a percentile interval need not hold the value
        axis.bar(x, estimate.value, width, yerr=error, error_kw={"lw": 1}, **look)
