"""--enable_jit_checkpoint: at SIGTERM a run ends its step, writes a checkpoint and exits with code 143.

transformers' own callback saves in the middle of a step, on one rank maybe before another, and lets training end as if
it were done.
"""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)
EXIT_CODE = 128 + signal.SIGTERM  # as of a process that the signal has ended: the run is not done


class StopAtSigterm(TrainerCallback):
    """All ranks stop after the same step, whichever of them got the signal."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._asked = self._stopping = False

    @classmethod
    def instead_of_transformers(cls, trainer: Trainer) -> "StopAtSigterm":
        """Replace transformers' callback. This one comes last, so that no other adds work to its checkpoint."""
        theirs: Any = trainer.pop_callback(JITCheckpointCallback)
        signal.signal(signal.SIGTERM, theirs.jit_manager._original_sigterm_handler or signal.SIG_DFL)
        stop = cls(trainer.accelerator)
        trainer.add_callback(stop)
        return stop

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        self._asked = self._stopping = False
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        asked: Any = self._asked
        if self.accelerator.num_processes > 1:
            asked = self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device), "sum")
        if asked:
            self._stopping = control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._stopping:
            return
        if state.is_world_process_zero:
            logger.warning(
                f"SIGTERM: stopped at step {state.global_step} of {state.max_steps}, with a checkpoint: "
                "--resume_from_checkpoint true goes on from it"
            )
        raise SystemExit(EXIT_CODE)
