"""A picture of what α did in a quickstart: entropy while training, and where each model ended."""

from collections.abc import Mapping
from pathlib import Path

from hdpo_train.evaluation.scores import Evaluation
from hdpo_train.run.report import read_metrics


def draw(runs: Mapping[str, Path], results: Mapping[str, Evaluation], path: Path) -> None:
    """runs: folders of the runs by name. results: evaluations by name, of the runs and of the model before them."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, ends = figure.subplots(1, 2)
    colors = {name: f"C{number}" for number, name in enumerate(results)}
    for name, folder in runs.items():
        lines = [line for line in read_metrics(folder) if "entropy/chosen" in line]
        points = [(line["step"], line["entropy/chosen"]) for line in lines]
        curves.plot(*zip(*points, strict=True), color=colors[name], label=name)
    curves.set(title="Entropy while training", xlabel="optimizer step", ylabel="nats per token of the chosen answers")
    for name, result in results.items():
        scores = result.sampled[1.0]
        assert scores.entropy is not None
        accuracy, entropy = scores.accuracy, scores.entropy
        errors = [[[each.value - each.low], [each.high - each.value]] for each in (entropy, accuracy)]
        ends.errorbar(
            entropy.value, accuracy.value, xerr=errors[0], yerr=errors[1], fmt="o", color=colors[name], label=name
        )
    ends.set(
        title="On held-out prompts (95 % intervals)",
        xlabel="entropy of the model's own answers, nats per token",
        ylabel="sampled accuracy",
    )
    for axis in (curves, ends):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
