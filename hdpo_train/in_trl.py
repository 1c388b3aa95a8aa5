"""`linear_logp` under TRL's own DPOTrainer: a stand-in for TRL's chunked log-prob function, and its metrics."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hdpo_kernels import linear_logp
from hdpo_kernels.checks import check_gradient
from hdpo_kernels.lm_head import HeadOptions
from hdpo_train.model.head import mean_logits

VERSION = "1.16."  # of TRL: the one whose trainer takes the same steps with and without (tests/train/test_trl.py)
_HERE = ("log_probs", "entropy", "mean_logits", "is_top1")


@contextmanager
def linear_logp_in_trl(
    gradient: str = "exact", epsilon: float = 2**-10, chunk_bytes: int | None = None
) -> Iterator[None]:
    """While it is open, TRL's DPOTrainer computes log-probs with `linear_logp`: losses, steps and metrics stay TRL's.

    It stands in for `trl.trainer.utils._ChunkedLogProbFunction`, which DPOTrainer calls at the head for policy and
    reference, whatever its options are.

    Args:
        gradient: "exact" or "sampled", of `linear_logp`.
        epsilon: of "sampled".
        chunk_bytes: most bytes of logits and their gradient held at a time; None: `linear_logp`'s default.

    Raises:
        ValueError: an option that `linear_logp` does not have.
        RuntimeError: TRL is not 1.16.
        NotImplementedError: in the trainer's first step, for use_weighting, DeepSpeed's ZeRO-3, or a trainer that
            divides logits by a temperature.
    """
    import trl

    seam: Any = importlib.import_module("trl.trainer.utils")
    check_gradient(gradient, epsilon)
    HeadOptions(chunk_bytes=chunk_bytes)
    if not trl.__version__.startswith(VERSION):
        raise RuntimeError(f"linear_logp fits under TRL {VERSION}*, and {trl.__version__} is installed: use that one")
    score = partial(_score, {"gradient": gradient, "epsilon": epsilon, "chunk_bytes": chunk_bytes})
    before, seam._ChunkedLogProbFunction = seam._ChunkedLogProbFunction, SimpleNamespace(apply=score)
    try:
        yield
    finally:
        seam._ChunkedLogProbFunction = before


def _score(
    options: dict[str, Any],
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,), all of them in the vocabulary
    temperature: float,
    vocab_tile: int,  # of TRL's tiles: pieces here are cut by rows
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> tuple[Tensor | None, ...]:
    """log_probs, entropy, log_sum_sq_probs, mean_logits and is_top1, each (N,); None where not among the outputs."""
    if missing := [name for name in outputs if name not in _HERE]:
        raise NotImplementedError(f"linear_logp has no {', '.join(missing)}: set use_weighting=False, or leave it out")
    if temperature != 1.0:
        raise NotImplementedError(f"linear_logp is fitted to DPOTrainer, which has no temperature, got {temperature}")
    if hasattr(weight, "ds_id"):
        raise NotImplementedError("ZeRO-3 takes the head's weight away before linear_logp's backward: use FSDP2 or DDP")
    token = linear_logp(hidden, weight, labels, bias=bias, softcap=softcap, logit_scale=logit_scale, **options)
    means = mean_logits(hidden, weight, bias, logit_scale) if "mean_logits" in outputs else None
    if means is not None and softcap is not None:
        means.fill_(torch.nan)  # of logits after a softcap it is not the mean
    return (
        token.logp,
        token.entropy if "entropy" in outputs else None,
        None,
        means,
        token.is_top1.bool() if "is_top1" in outputs else None,
    )
