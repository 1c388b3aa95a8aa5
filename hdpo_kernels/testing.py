"""What tests and benchmarks share: inputs that look like a language model's, fp64 truth at any size, tolerances.

N rows, V vocabulary, H hidden size, S = 2P sequences interleaved chosen, rejected.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hdpo_kernels import naive
from hdpo_kernels.naive import IGNORE_INDEX, HDPOLoss
from hdpo_kernels.ops import bodies


class HeadInputs(NamedTuple):
    """The positional arguments of `linear_hdpo_loss`."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,) int64
    cu_seqlens: list[int]  # S + 1
    ref_logps: Tensor  # (S,) fp32, nats

    def to(self, dtype: torch.dtype) -> "HeadInputs":
        """The same numbers, rounded to dtype; ref_logps stay in at least fp32, as they are kept on disk."""
        ref_logps = self.ref_logps.to(torch.promote_types(dtype, torch.float32))
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), ref_logps=ref_logps)


class Outcome(NamedTuple):
    """What a loss function makes of its inputs."""

    result: HDPOLoss
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor | None


def zipf_inputs(
    lengths: Sequence[int],
    vocab: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    masked: float = 0.0,
    sharpness: float = 8.0,
    seed: int = 0,
) -> HeadInputs:
    """Sequences of the given lengths (tokens) from a synthetic language model with Zipf's unigram distribution.

    Rows of the weight share one direction (the unigram log-probabilities), and a hidden state points to its label and
    to three alternatives; about 3.7, 1.9 and 0.45 nats of entropy a token at sharpness 5, 8 and 12 for V = 32,000 and
    H = 1,024. masked: fraction of rows whose label is -100.
    """
    rng = torch.Generator(device).manual_seed(seed)
    n = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, device=device)

    shared = torch.nn.functional.normalize(normal(hidden_size), dim=0)
    weight = normal(vocab, hidden_size) / math.sqrt(hidden_size)
    weight -= torch.outer(weight @ shared, shared)
    z = -torch.log(torch.arange(1, vocab + 1, device="cpu") + 10.0)
    cumulative, z = z.softmax(0).cumsum(0).to(device), z.to(device)  # a GPU's cumsum may not be deterministic
    # the label and its alternatives, by inversion
    tokens = torch.searchsorted(cumulative, uniform(4, n)).clamp(max=vocab - 1)
    pull = sharpness + 10 * uniform(n, 1)
    hidden = 0.7 * normal(n, hidden_size) + shared + pull * weight[tokens[0]]
    for alternative in tokens[1:]:
        hidden += uniform(n, 1) * (pull - 2) * weight[alternative]
    weight += torch.outer(z, shared)

    labels = tokens[0].masked_fill(uniform(n) < masked, IGNORE_INDEX)
    tokens_per_sequence = torch.tensor([float(length) for length in lengths], device=device)
    ref_logps = -2.0 * tokens_per_sequence + normal(len(lengths))
    cu_seqlens = [0, *itertools.accumulate(lengths)]
    return HeadInputs(hidden.to(dtype), weight.to(dtype), labels, cu_seqlens, ref_logps)


def run(
    function: Callable[..., HDPOLoss], inputs: HeadInputs, *, bias: Tensor | None = None, d_loss: float = 1.0, **options
) -> Outcome:
    """Forward and backward of linear_hdpo_loss or its oracle; every input needs a gradient, d_loss is upstream's."""
    leaves = [t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight, bias) if t is not None]
    if bias is not None:
        options["bias"] = leaves[2]
    result = function(leaves[0], leaves[1], *inputs[2:], **options)
    grads = torch.autograd.grad(result.loss, leaves, torch.full_like(result.loss, d_loss))
    detached = HDPOLoss(*(None if t is None else t.detach() for t in result))  # type: ignore[arg-type]
    return Outcome(detached, grads[0], grads[1], None if bias is None else grads[2])


def true_outcome(
    inputs: HeadInputs,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    slice_rows: int = 512,
    **loss_options: Any,
) -> Outcome:
    """`run(naive.linear_hdpo_loss, …)` in fp64, `slice_rows` rows of logits at a time, to fit at real sizes."""
    exact = inputs.to(torch.float64)
    leaves = [t.requires_grad_() for t in (exact.hidden.clone(), exact.weight.clone())]
    if bias is not None:
        leaves.append(bias.double().detach().clone().requires_grad_())
    labels, cu_seqlens = exact.labels, exact.cu_seqlens

    def token_logp(rows: slice) -> naive.TokenLogp:
        return naive.linear_logp(
            leaves[0][rows],
            leaves[1],
            labels[rows],
            bias=leaves[2] if bias is not None else None,
            softcap=softcap,
            logit_scale=logit_scale,
        )

    slices = [slice(start, start + slice_rows) for start in range(0, len(labels), slice_rows)]
    with torch.no_grad():
        logp, *others = (torch.cat(parts) for parts in zip(*map(token_logp, slices), strict=True))
    lengths = naive.sequence_sum((labels != IGNORE_INDEX).double(), cu_seqlens)
    logps = naive.sequence_sum(logp, cu_seqlens).requires_grad_()
    options = {"alpha": 1.0, "beta": 0.1, **loss_options}
    result = naive.pair_loss(logps, exact.ref_logps, lengths=lengths, **options)
    entropy, accuracy = (naive.sequence_sum(x, cu_seqlens) / lengths.clamp(min=1) for x in others)
    (per_sequence,) = torch.autograd.grad(result.loss, logps)
    per_row = per_sequence.repeat_interleave(torch.tensor(cu_seqlens, device=logps.device).diff())
    for rows in slices:
        (token_logp(rows).logp * per_row[rows]).sum().backward()
    grads = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
    result = result._replace(loss=result.loss.detach(), logps=logps.detach(), entropy=entropy, accuracy=accuracy)
    return Outcome(result, grads[0], grads[1], grads[2] if bias is not None else None)


def assert_as_accurate_as(
    actual: Tensor, baseline: Tensor, truth: Tensor, *, scale: float | None = None, name: str = "result"
) -> None:
    """error(actual) ≤ 2 · error(baseline) + a rounding band, errors against truth (fp64), largest and root mean square.

    baseline: what plain torch makes of the same low-precision inputs. The band is twice the spacing (eps) of actual's
    dtype at `scale`, the size of the largest number that is rounded on the way; default max |truth|. Where truth is not
    finite, actual must be the same.
    """
    assert actual.shape == truth.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    truth = truth.double()
    finite = truth.isfinite()
    special = actual.double()[~finite]
    assert torch.equal(special.nan_to_num(nan=0.5), truth[~finite].nan_to_num(nan=0.5)), (
        f"{name}: {special.tolist()} where the truth is {truth[~finite].tolist()}"
    )
    if not finite.any():
        return
    errors = [torch.where(finite, x.double() - truth, 0.0).abs() for x in (actual, baseline)]
    size = float(truth.masked_fill(~finite, 0.0).abs().max()) if scale is None else scale
    band = 2 * torch.finfo(actual.dtype).eps * size
    for kind, measure in (("largest", torch.amax), ("root mean square", lambda e: e.square().mean().sqrt())):
        error, allowed = (float(measure(e)) for e in errors)
        assert error <= 2 * allowed + band, (
            f"{name}: {kind} error {error:.3g}, more than twice torch's {allowed:.3g} plus {band:.3g} for rounding"
        )


def assert_outcome_as_accurate_as(actual: Outcome, baseline: Outcome, truth: Outcome) -> None:
    """`assert_as_accurate_as` for the loss, everything beside it, and every gradient."""
    # A margin is a difference of rewards and rounded at their size; the loss is a function of margins.
    rewards = torch.cat([truth.result.chosen_rewards, truth.result.rejected_rewards, truth.result.loss.view(1)])
    size = float(rewards.abs().nan_to_num(posinf=0.0).max())
    names = (*HDPOLoss._fields, *Outcome._fields[1:])
    for name, x, y, z in zip(names, *((*o.result, *o[1:]) for o in (actual, baseline, truth)), strict=True):
        assert (x is None) == (y is None) == (z is None), name
        if x is not None and y is not None and z is not None:
            assert_as_accurate_as(x, y, z, scale=size if name in ("loss", "margins") else None, name=name)


class Operations(TorchDispatchMode):
    """Records, while active, the matrix products run and the tensors made.

    gemm_flops: floating-point operations in matrix products (2·N·V·H is one GEMM of the head).
    made: shape and dtype of every tensor that an operation returned without it being a view of an input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gemm_flops = 0
        self.made: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:] if name == "mm" else args[1:3]
            self.gemm_flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        if func in bodies:  # what the package's own operators do inside is what is recorded
            with self:
                return bodies[func](*args, **kwargs)
        known = {t.untyped_storage().data_ptr() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.made.append((tuple(t.shape), t.dtype))
        return out

    @property
    def largest(self) -> int:
        """Most bytes of one tensor made."""
        return max((math.prod(shape) * dtype.itemsize for shape, dtype in self.made), default=0)
