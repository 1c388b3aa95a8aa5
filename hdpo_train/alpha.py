"""α over a run: constant, on a schedule, or steered so that the policy's entropy reaches a target."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hdpo_train.loss import StepLoss

logger = logging.get_logger(__name__)
SCHEDULES = ("constant", "linear", "cosine")


def alpha_at(schedule: str, start: float, end: float, progress: float) -> float:
    """α when a share `progress` in [0, 1] of the steps is done; cosine: half a wave, slow at both ends."""
    share = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[schedule]
    return start + (end - start) * share


class Target(NamedTuple):
    """Entropy to reach: nats per token, or a share of the entropy before training."""

    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str | float) -> "Target":
        """'0.9' or '90%': that share. '0.65 nats': nats per token. Raises ValueError."""
        match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%|nats?)?\s*", str(text))
        try:
            value, unit = float(match[1]), match[2]  # type: ignore[index]
        except (TypeError, ValueError):
            raise ValueError(
                f"target_entropy must be a share of the entropy before training ('0.9' or '90%') or nats per token "
                f"('0.65 nats'), got {text!r}"
            ) from None
        relative = unit in (None, "%")
        value = value / 100 if unit == "%" else value
        if not 0 < value < math.inf or (relative and value > 5):
            hint = f"; for nats write '{value:g} nats'" if relative else ""
            raise ValueError(f"target_entropy must be positive, and at most 5 as a share, got {text!r}{hint}")
        return cls(value, relative)

    def nats(self, before: float) -> float:
        return self.value * before if self.relative else self.value


class AlphaSchedule(TrainerCallback):
    """Sets the loss's α at the beginning of every optimizer step."""

    def __init__(self, loss: StepLoss, schedule: str, end: float) -> None:
        self.loss, self.schedule, self.start, self.end = loss, schedule, loss.alpha, end

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        progress = state.global_step / max(state.max_steps - 1, 1)
        self.loss.alpha = alpha_at(self.schedule, self.start, self.end, progress)


class EntropyControl(TrainerCallback):
    """Steers α so that the entropy of the policy's own answers reaches a target: more entropy needs a larger α.

    A PI controller on logarithms. Every `every` steps (default: 40 times in a run, and at least every 10 steps) the
    policy is probed, and with m = ln(measured / target)

        ln α ← ln α − INTEGRAL · m − PROPORTIONAL · (m − m of the probe before)      by at most STEP, within bounds

    which leaves a bound as soon as the error turns round. `probe` gives (sum of nats, tokens) of a policy over all
    ranks, so that all have the same α. A share as target is one of the entropy before training. What the controller
    knows is part of every checkpoint.
    """

    # The quickstart's ln entropy answers a change of ln α by 0.3 times as much, within some 30 steps.
    INTEGRAL, PROPORTIONAL, STEP = 0.6, 2.0, 0.25
    TOLERANCE = 0.05  # of the target: farther off at the end is worth a warning

    def __init__(
        self,
        loss: StepLoss,
        target: Target,
        probe: Callable[[Any], tuple[float, int]],
        *,
        bounds: tuple[float, float],
        every: int | None = None,
    ) -> None:
        self.loss, self.target, self.probe, self.bounds, self.every = loss, target, probe, bounds, every
        self._start = {"alpha": loss.alpha, "error": 0.0, "before": None, "measured": None}
        self._known: dict[str, Any] = dict(self._start)  # before, measured: nats per token

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        saved: Any = state.stateful_callbacks  # what transformers writes into every checkpoint
        self._known = saved.setdefault("entropy_control", dict(self._start))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        known = self._known
        if state.global_step % (self.every or min(max(state.max_steps // 40, 1), 10)) == 0:
            self._measure(model)
            error = math.log(known["measured"] / self.target.nats(known["before"]))
            change = -self.INTEGRAL * error - self.PROPORTIONAL * (error - known["error"])
            change = min(max(change, -self.STEP), self.STEP)
            known["alpha"] = min(max(known["alpha"] * math.exp(change), self.bounds[0]), self.bounds[1])
            known["error"] = error
        self.loss.alpha = known["alpha"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            self._measure(model)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        taken = self._known["measured"] is not None  # else a run without a step
        if taken and state.is_world_process_zero and abs(self.share_of_target() - 1) > self.TOLERANCE:
            logger.warning(self.describe())

    def metrics(self) -> dict[str, float]:
        known = self._known
        if known["before"] is None:
            return {}
        return {"entropy/policy": known["measured"], "entropy/target": self.target.nats(known["before"])}

    def share_of_target(self) -> float:
        return self._known["measured"] / self.target.nats(self._known["before"])

    def describe(self) -> str:
        """How far the run got, and what may have been in the way."""
        before, measured = self._known["before"], self._known["measured"]
        if measured is None:
            return "no step was taken: the entropy of the policy's own answers was not measured"
        text = (
            f"entropy of the policy's own answers: {before:.3f} nats per token before training, {measured:.3f} after, "
            f"{measured / before:.2f} of it; target {self.target.nats(before):.3f}"
        )
        off = self.share_of_target() - 1
        if abs(off) <= self.TOLERANCE:
            return text
        at, way = (self.bounds[1], "alpha_max") if off < 0 else (self.bounds[0], "alpha_min")
        if self._known["alpha"] == at:
            return f"{text}. {abs(off):.0%} off: alpha stands at {way} = {at:g}"
        return f"{text}. {abs(off):.0%} off: alpha had too few steps at too low a learning rate, or beta is too high"

    def _measure(self, model: Any) -> None:
        nats, tokens = self.probe(model)
        if not 0 < nats < math.inf:
            raise FloatingPointError(
                f"the entropy of the policy's own answers is {nats / max(tokens, 1)} nats per token: nothing to steer "
                "by; the model is broken, or certain of every token"
            )
        self._known["measured"] = nats / tokens
        if self._known["before"] is None:
            self._known["before"] = self._known["measured"]
