"""What a run leaves to look at: metrics.jsonl while it goes, report.png at its end."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)
METRICS_FILE, REPORT_FILE = "metrics.jsonl", "report.png"


class RunReport(TrainerCallback):
    """Appends every log line to metrics.jsonl (its first line: what the run starts from), and draws report.png."""

    def __init__(self, start: dict[str, Any]) -> None:
        self.start = start

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        # A resumed run goes on from its checkpoint: lines logged after it belong to steps that are done again.
        lines = [line for line in read_metrics(str(args.output_dir)) if 0 < line["step"] <= state.global_step]
        write_metrics(str(args.output_dir), [{"step": 0, **self.start}, *lines])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            with open(Path(str(args.output_dir)) / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            try:
                draw(str(args.output_dir))
            except Exception as error:  # a plot that fails must not lose the model that is saved next
                logger.warning(f"{REPORT_FILE} could not be drawn: {error!r}")


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    path = Path(output_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a run that was killed while writing it
            if number < len(path.read_text(encoding="utf-8").splitlines()):
                raise ValueError(f"{path}, line {number} is not JSON: {line[:80]!r}") from None
    return lines


def write_metrics(output_dir: str | Path, lines: list[dict[str, Any]]) -> None:
    path = Path(output_dir) / METRICS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def draw(output_dir: str | Path) -> Path:
    """report.png from metrics.jsonl: loss, rewards and margins, accuracy, entropy over steps."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    start, *lines = read_metrics(output_dir)
    panels = {
        "Loss": ["loss"],
        "Rewards, nats × β": ["rewards/chosen", "rewards/rejected", "rewards/margins"],
        "Reward accuracy": ["rewards/accuracies"],
        "Entropy, nats per token": ["entropy/chosen", "entropy/rejected"],
    }
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=True):
        for key in keys:
            for prefix, line_style in (("", "-"), ("eval_", "--")):
                points = [(line["step"], line[prefix + key]) for line in lines if prefix + key in line]
                if points:
                    label = prefix.replace("_", " ") + key.rsplit("/", 1)[-1]
                    marker = "o" if prefix or len(points) == 1 else ""  # a single point is invisible as a line
                    axis.plot(*zip(*points, strict=True), line_style + marker, label=label)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    if "alpha" in start:
        figure.suptitle(
            f"{start['loss_type']}, α = {start['alpha']:g}, β = {start['beta']:g}, {start['pairs']} pairs; "
            f"margin before training {start['initial_margin']:+.3f} (α = 1: 0)"
        )
    path = Path(output_dir) / REPORT_FILE
    figure.savefig(path, dpi=130)
    return path
