"""The same loss by several hands: functions that run forward and backward and return (loss, d_hidden, d_weight)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hdpo_kernels
from benchmarks.harness import installed
from hdpo_kernels import naive

LOSS: dict[str, Any] = {"alpha": 0.9, "beta": 0.1}


class Problem(NamedTuple):
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,)
    cu_seqlens: Tensor  # (S + 1,) on the CPU
    ref_logps: Tensor  # (S,)


def make_problem(rows: int, vocab: int, width: int, sequences: int, device: str, dtype: torch.dtype) -> Problem:
    """Random inputs whose logits have a spread of about two nats, as a trained head's have. Never zeros."""
    generator = torch.Generator(device).manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    labels = torch.randint(0, vocab, (rows,), generator=generator, device=device)
    return Problem(
        normal(rows, width).to(dtype).requires_grad_(),
        (2 * normal(vocab, width) / width**0.5).to(dtype).requires_grad_(),
        labels,
        torch.linspace(0, rows, sequences + 1).round().long(),
        -(rows / sequences) * (1 + torch.rand(sequences, generator=generator, device=device)),
    )


def _gradients(loss: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    d_hidden, d_weight = torch.autograd.grad(loss, (problem.hidden, problem.weight))
    return loss.detach(), d_hidden, d_weight


def ours(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(hdpo_kernels.linear_hdpo_loss(*problem, **LOSS).loss, problem)


def plain(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(naive.linear_hdpo_loss(*problem, **LOSS).loss, problem)


def trl(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's ChunkedLogProbFunction as its DPOTrainer calls it (log-probs and entropy), this loss on top."""
    from trl.kernels import ChunkedLogProbFunction

    logp, *_ = ChunkedLogProbFunction.apply(
        problem.hidden, problem.weight, None, problem.labels, 1.0, 32768, None, 1.0, ("entropy",)
    )
    logps = naive.sequence_sum(logp, problem.cu_seqlens)
    return _gradients(naive.pair_loss(logps, problem.ref_logps, **LOSS).loss, problem)


CONTESTANTS: dict[str, Callable[[Problem], tuple[Tensor, Tensor, Tensor]]] = {"hdpo_kernels": ours, "naive": plain}
if installed("trl"):
    CONTESTANTS["trl"] = trl


def three_gemms(problem: Problem) -> Callable[[], None]:
    """The floor: the three products of forward and backward, into memory that is there already."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits, d_hidden, d_weight = hidden @ weight.T, torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    return run
