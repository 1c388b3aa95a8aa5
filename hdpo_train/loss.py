"""The loss of a run: which, how it is computed, and the alpha of the step. Losses of the user's are loaded here."""

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hdpo_kernels.pair import LossFunction, PairOptions


@dataclass
class StepLoss:
    """The loss of an optimizer step: the run's options, and the α of this step.

    The trainer computes with it, callbacks set its α, and nothing else knows that α.
    """

    pairs: PairOptions
    head: Mapping[str, Any]  # gradient, epsilon, chunk_bytes
    own: LossFunction | None = None  # in place of pairs.loss_type

    def __post_init__(self) -> None:
        if self.own is not None:
            self.pairs.check_own_loss()

    @property
    def alpha(self) -> float:
        return self.pairs.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.pairs = replace(self.pairs, alpha=value)

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `hdpo_kernels.linear_hdpo_loss`."""
        return {**asdict(self.pairs), **self.head, **({} if self.own is None else {"loss_type": self.own})}

    @property
    def way(self) -> str:
        """How the head computes it, in words."""
        if self.head["gradient"] == "sampled":
            return "log-probs first, then rounded rows of the gradient: 1 GEMM"
        if self.own is not None:
            return "a function of yours: logits once more in backward, 4 GEMMs"
        return self.pairs.way


def is_own_loss(loss_type: Any) -> bool:
    """Whether loss_type names a function of the user's, file.py:function."""
    return isinstance(loss_type, str) and ".py:" in loss_type


def load_own_loss(loss_type: str) -> LossFunction:
    """The function that file.py:function names: policy (S,), reference (S,), lengths (S,) -> losses (P,) or ().

    Raises ValueError for a file that is not there, cannot be imported, or has no such function.
    """
    name, _, function_name = loss_type.rpartition(":")
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"loss_type {loss_type}: there is no file {path}")
    alias = f"hdpo_loss_{path.stem}"  # not the stem: a file may be called json.py
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = sys.modules[alias] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"loss_type {loss_type}: {path} cannot be imported: {error!r}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"loss_type {loss_type}: {path} has no function {function_name!r}")
    return function
