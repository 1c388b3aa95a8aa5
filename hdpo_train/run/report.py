"""What a run leaves to look at: metrics.jsonl while it goes, report.png at its end."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from hdpo_train.files import write_whole

logger = logging.get_logger(__name__)
METRICS_FILE, REPORT_FILE = "metrics.jsonl", "report.png"


class RunReport(TrainerCallback):
    """Appends every log line to metrics.jsonl (its first line: what the run starts from), and draws report.png."""

    def __init__(self, start: dict[str, Any]) -> None:
        self.start = start
        self._is_complete = False  # metrics.jsonl is that of a whole run, which nothing is added to

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        # A resumed run goes on from its checkpoint: lines logged after it belong to steps that are done again. But an
        # evaluation at the end of an epoch comes after the checkpoint of its last step, and is not done again.
        lines = [{"step": line["step"], **line} for line in state.log_history]
        before = read_metrics(str(args.output_dir)) if lines else []
        has_summary = any("train_runtime" in line for line in before)
        self._is_complete = has_summary and state.global_step >= state.max_steps
        if self._is_complete:
            return
        lines += [line for line in before if line["step"] == state.global_step and line not in lines]
        lines = [line for line in lines if "train_runtime" not in line]  # the summary of a run that ended there
        write_metrics(str(args.output_dir), [{"step": 0, **self.start}, *lines])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Means are over the steps since the last line: if a checkpoint were between two lines, those would be lost.
        saves = control.should_save or (control.should_evaluate and args.save_strategy == SaveStrategy.BEST)
        control.should_log |= saves or state.global_step >= state.max_steps

    on_epoch_end = on_step_end

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs and not self._is_complete:
            path = Path(str(args.output_dir)) / METRICS_FILE
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
            except OSError as error:
                raise OSError(
                    f"{path} could not be written ({error.strerror}); make room, then --resume_from_checkpoint true "
                    "goes on from the last checkpoint"
                ) from error

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._is_complete = False
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
    write_whole(Path(output_dir) / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines))


def mean_loss(log_history: list[dict[str, Any]]) -> float | None:
    """Mean over all steps of a run, resumed or not, from lines that are means since the line before."""
    total, last = 0.0, 0
    for line in log_history:
        if "loss" in line:
            total, last = total + line["loss"] * (line["step"] - last), line["step"]
    return total / last if last else None


def draw(output_dir: str | Path) -> Path:
    """report.png from metrics.jsonl: loss, rewards and margins, accuracy, entropy over steps; α where it changes."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    start, *lines = read_metrics(output_dir)
    panels = {
        "Loss": ["loss"],
        "Rewards, nats × β": ["rewards/chosen", "rewards/rejected", "rewards/margins"],
        "Reward accuracy": ["rewards/accuracies"],
        "Entropy, nats per token": ["entropy/chosen", "entropy/rejected", "entropy/policy", "entropy/target"],
    }
    changing = len({line["alpha"] for line in lines if "alpha" in line}) > 1
    if changing:
        panels["α"] = ["alpha"]
    columns = (len(panels) + 1) // 2
    figure = Figure(figsize=(5.5 * columns, 7), layout="constrained")
    axes = figure.subplots(2, columns, sharex=True)
    for axis, above in zip(axes.flat[len(panels) :], axes[0, ::-1], strict=False):
        axis.set_visible(False)
        above.tick_params(labelbottom=True)
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=False):
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
        level = " by token" if start.get("alpha_level") == "token" else ""
        figure.suptitle(
            f"{start['loss_type']}, α {'from' if changing else '='} {start['alpha']:g}{level}, β = {start['beta']:g}, "
            f"{start['pairs']} pairs; margin before training {start['initial_margin']:+.3f} (α = 1: 0)"
        )
    path = Path(output_dir) / REPORT_FILE
    figure.savefig(path, dpi=130)
    return path
