"""The same loss by several hands. To add one: a function from a problem to log-probs or to the loss, and a line below.

A contestant that only knows log-probs gets plain PyTorch's pair loss on top. Functions are called with and without
gradients; packages are imported when they are first used, which is never in a timed round.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.shapes import Problem
from benchmarks.table import installed
from hdpo_kernels import linear_hdpo_loss, linear_logp, naive
from hdpo_kernels.naive import IGNORE_INDEX

LOSS: dict[str, Any] = {"alpha": 0.9, "beta": 0.1}
OURS, NAIVE = "hdpo_kernels", "naive"
FUSED, CHUNKED = "fused", "chunked"


class Contestant(NamedTuple):
    name: str
    note: str  # what it is, for the legend of a table
    logp: Callable[[Problem], Tensor] | None = None  # (N,) log-probs of the labels, nats
    loss: Callable[[Problem], Tensor] | None = None  # () the loss; None: plain PyTorch's on top of logp
    package: str = ""  # what it needs, and whose version is written down
    needs_cuda: bool = False
    has_softcap: bool = True
    has_reference: bool = True  # False: it computes the loss with reference log-probs of zero
    has_backward: bool = True
    missing: str = ""  # why it cannot run on this machine

    def obstacle(self, problem: Problem) -> str:
        """Why it cannot run on this problem, or nothing."""
        if self.missing:
            return self.missing
        if self.package and not installed(self.package):
            return "not installed"
        if self.needs_cuda and problem.hidden.device.type != "cuda":
            return "needs CUDA"
        if problem.softcap is not None and not self.has_softcap:
            return "no softcap"
        return ""

    def forward(self, problem: Problem) -> tuple[Tensor]:
        assert self.logp is not None
        with torch.no_grad():
            return (self.logp(problem),)

    def forward_backward(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, d_hidden, d_weight."""
        if self.loss is not None:
            loss = self.loss(problem)
        else:
            assert self.logp is not None
            logps = naive.sequence_sum(self.logp(problem), problem.cu_seqlens)
            loss = naive.pair_loss(logps, problem.ref_logps, **LOSS).loss
        d_hidden, d_weight = torch.autograd.grad(loss, (problem.hidden, problem.weight))
        return loss.detach(), d_hidden, d_weight


def ours_logp(problem: Problem) -> Tensor:
    return linear_logp(problem.hidden, problem.weight, problem.host_labels, softcap=problem.softcap).logp


def ours_loss(problem: Problem, **options: Any) -> Tensor:
    labels, rest = problem.host_labels, (problem.cu_seqlens, problem.ref_logps)
    options = {**LOSS, **options, "softcap": problem.softcap}
    return linear_hdpo_loss(problem.hidden, problem.weight, labels, *rest, **options).loss


def ours_fused_logp(problem: Problem) -> Tensor:
    from hdpo_kernels.fused import linear_stats

    return linear_stats(*problem[:3], softcap=problem.softcap).logp


def ours_chunked_logp(problem: Problem) -> Tensor:
    with mock.patch("hdpo_kernels.lm_head.FUSED_MAX_HIDDEN", 0):
        return ours_logp(problem)


def naive_logp(problem: Problem) -> Tensor:
    return naive.linear_logp(*problem[:3], softcap=problem.softcap).logp


def naive_loss(problem: Problem) -> Tensor:
    return naive.linear_hdpo_loss(*problem[:5], softcap=problem.softcap, **LOSS).loss


@functools.cache
def _compiled() -> Callable[..., naive.TokenLogp]:
    return torch.compile(naive.linear_logp, dynamic=False)


def compiled_logp(problem: Problem) -> Tensor:
    return _compiled()(*problem[:3], softcap=problem.softcap).logp


def trl_logp(problem: Problem) -> Tensor:
    """As DPOTrainer calls it: entropies too; on CUDA the scored rows alone, elsewhere all rows."""
    from trl.kernels import ChunkedLogProbFunction

    scored = problem.labels != IGNORE_INDEX
    compact = problem.hidden.is_cuda
    hidden = problem.hidden[scored] if compact else problem.hidden
    labels = problem.labels[scored] if compact else problem.labels.clamp(min=0)
    logp, *_ = ChunkedLogProbFunction.apply(
        hidden, problem.weight, None, labels, 1.0, 32768, problem.softcap, 1.0, ("entropy",)
    )
    return logp.new_zeros(scored.shape).masked_scatter(scored, logp) if compact else logp.masked_fill(~scored, 0)


def liger_loss(problem: Problem) -> Tensor:
    """Its batch is padded, chosen sequences first."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    lengths = [end - start for start, end in itertools.pairwise(problem.cu_seqlens)]

    def batch(packed: Tensor, padding: int) -> Tensor:
        sequences = packed.split(lengths)
        return pad_sequence([*sequences[0::2], *sequences[1::2]], batch_first=True, padding_value=padding)

    loss = LigerFusedLinearDPOLoss(beta=LOSS["alpha"] * LOSS["beta"], use_ref_model=False)
    return loss(problem.weight, batch(problem.hidden, 0), batch(problem.labels, IGNORE_INDEX))[0]


def cce_logp(problem: Problem, **options: Any) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(*problem[:3], softcap=problem.softcap, reduction="none", **options)


def torch_logp(problem: Problem) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # without them it is plain PyTorch with all logits
    return -F.linear_cross_entropy(*problem[:3], reduction="none", options=options)


CONTESTANTS = (
    Contestant(OURS, "this package, labels on the CPU as its trainer has them", ours_logp, ours_loss),
    # Its two ways to log-probs without a gradient; which one it takes where is hdpo_kernels/rows/__init__.py's.
    Contestant(FUSED, "our fused forward", ours_fused_logp, needs_cuda=True, has_backward=False),
    Contestant(CHUNKED, "our logits in chunks", ours_chunked_logp, needs_cuda=True, has_backward=False),
    Contestant(NAIVE, "plain PyTorch with all logits", naive_logp, naive_loss),
    Contestant("naive compiled", "the same under `torch.compile`", compiled_logp),
    Contestant("trl", "its `ChunkedLogProbFunction`, as `DPOTrainer` calls it", trl_logp, package="trl"),
    Contestant(
        "liger",
        "its `LigerFusedLinearDPOLoss`, without a reference: it takes no cached reference log-probs",
        loss=liger_loss,
        package="liger-kernel",
        has_softcap=False,
        has_reference=False,
    ),
    # Its kernels are CUDA's alone; the implementation it has for elsewhere is what "naive compiled" is.
    Contestant(
        "cce",
        # Its filter_eps "high" is its "auto": utils.py, _handle_eps; what it does: cce_backward.py, _block_is_filtered.
        "Cut Cross Entropy as it comes, which skips a block of rows and (sorted) vocabulary in backward if every "
        "|p − onehot| in it is below the dtype's eps / 32, 2⁻¹² for bf16",
        cce_logp,
        package="cut-cross-entropy",
        needs_cuda=True,
    ),
    Contestant(
        "cce unfiltered",
        "the same, no gradient left out",
        functools.partial(cce_logp, filter_eps=None),
        package="cut-cross-entropy",
        needs_cuda=True,
    ),
    Contestant(
        "torch",
        "`F.linear_cross_entropy`, chunked",
        torch_logp,
        package="torch",
        has_softcap=False,
        missing="" if hasattr(F, "linear_cross_entropy") else "needs torch 2.13",
    ),
)


def rank(name: str) -> int:
    """Where a contestant stands in tables and plots: we first, then the floors."""
    order = [OURS, "hdpo_train", "three GEMMs", "one GEMM", *(contestant.name for contestant in CONTESTANTS)]
    return order.index(name) if name in order else len(order)


def one_gemm(problem: Problem) -> Callable[[], None]:
    """The floor of a forward: the logits of the scored rows, into memory that is there already."""
    hidden, weight = _scored_hidden(problem), problem.weight.detach()
    logits = hidden @ weight.T

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)

    return run


def three_gemms(problem: Problem) -> Callable[[], None]:
    """The floor of forward and backward: the three products over the scored rows, into memory that is there already."""
    hidden, weight = _scored_hidden(problem), problem.weight.detach()
    logits, d_hidden, d_weight = hidden @ weight.T, torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)

    return run


def _scored_hidden(problem: Problem) -> Tensor:
    return problem.hidden.detach()[problem.labels != IGNORE_INDEX]
