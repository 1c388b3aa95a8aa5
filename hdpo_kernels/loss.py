"""The H-DPO loss with its gradients in one pass: 3 GEMMs, nothing recomputed, memory bounded at any length.

    hidden, weight, labels ── LMHead.score ──> logp (N,) ── sequence_sum ──> logps (S,) ── pair.evaluate ──> loss ()
    d_hidden, d_weight <──── one scalar per sequence, c (S,) = a · f'(u) + k <──────────────────┘

N scored rows, V vocabulary, H hidden size, S = 2P sequences interleaved chosen, rejected.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, astuple
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hdpo_kernels import pair
from hdpo_kernels.checks import (
    as_boundaries,
    boundaries,
    check_gradient,
    check_head,
    check_label_values,
    check_labels,
    check_ref_logps,
)
from hdpo_kernels.chunks import plan_chunks
from hdpo_kernels.lm_head import HeadOptions, LMHead, ScoredRows, WeightGrad, full_precision, times
from hdpo_kernels.logp import compute_dtype, linear_logp, needs_grad
from hdpo_kernels.naive import IGNORE_INDEX, HDPOLoss, TokenLogp
from hdpo_kernels.ops import operator
from hdpo_kernels.pair import PairOptions
from hdpo_kernels.parallel import Ranks, VocabShard, sum_over_ranks
from hdpo_kernels.rows import backend
from hdpo_kernels.sequence import sequence_of_row, sequence_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_hdpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    ref_logps: Tensor | None,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: str = "exact",
    epsilon: float = 2**-10,
    chunk_bytes: int | None = None,
    tp_group: "ProcessGroup | None" = None,
    sp_group: "ProcessGroup | None" = None,
) -> HDPOLoss:
    """Entropy-controllable DPO (H-DPO, arXiv 2411.07595) from hidden states, without ever holding (N, V) logits.

        ℓ_s = Σ_{t in s} log softmax(softcap · tanh(logit_scale · (h_t Wᵀ + b) / softcap))[y_t]
        z_p = β [(α ℓ_w − ρ_w) − (α ℓ_l − ρ_l)]            L = mean_p −log σ(z_p)

    hidden (N, H), weight (V, H) of one dtype (fp32, bf16, fp16 or fp64; under autocast both are cast to its dtype);
    labels (N,) int64, -100 = not scored, on hidden's device or the CPU (there they are checked, and rows not scored
    skip the head; elsewhere a label outside the vocabulary makes the loss NaN); cu_seqlens (S + 1,) int, boundaries of
    the sequences, chosen and rejected in turn, a list or a CPU tensor (a tensor on another device costs one sync);
    ref_logps (S,) log-probabilities of the reference policy, nats, or None (zeros).
    alpha < 1 sharpens, 1 is DPO, > 1 diversifies. beta, loss_type, label_smoothing, nll_weight: see `pair_loss`.
    gradient: "exact", 3 GEMMs; or "sampled", 1 GEMM: rows of ∂loss/∂logits are rounded, without bias, to at most
    1/epsilon + 2 entries, see `linear_logp`. epsilon in (0, 0.5]: smaller is less noise, more entries.
    bias (V,). chunk_bytes: most bytes of logits and their gradient held at a time (on a CPU kept for the thread's next
    call).
    tp_group: ranks that each have a run of rows of weight (and bias), in the order of ranks, and the same hidden and
    labels (numbers of the whole vocabulary). Every rank gets the loss, all of d_hidden, and d_weight of its own rows.
    sp_group: ranks that each have some tokens of the same S sequences, cu_seqlens being this rank's (a sequence may
    have none here), and all of weight. Every rank gets the loss, its d_hidden, and its tokens' part of d_weight, which
    is to be summed over the group like the gradients of the rest of the model.
    Under torch.compile pass cu_seqlens as a CPU tensor: a list is compiled into the graph.

    Returns HDPOLoss(loss, logps, entropy, chosen_rewards, rejected_rewards, margins); only `loss` carries a gradient.
    Exact gradients are formed in forward where they are needed and consumed by the first backward. A NaN or inf in the
    input comes out as a NaN loss; a sequence without scored rows, or no pair at all, counts as zero.

    Raises ValueError / TypeError for shapes, dtypes, devices, boundaries, labels or options that do not fit.
    """
    head_options = HeadOptions(softcap, logit_scale, chunk_bytes)
    pair_options = PairOptions(alpha, beta, loss_type, label_smoothing, nll_weight)
    check_head(hidden, weight, labels, bias)
    check_gradient(gradient, epsilon, weight.shape[0])
    cu_seqlens = as_boundaries(cu_seqlens, pairs=True)
    check_ref_logps(ref_logps, cu_seqlens.shape[0] - 1, hidden.device)
    tp_name, sp_name = (None if group is None else group.group_name for group in (tp_group, sp_group))
    if gradient == "sampled":
        if tp_name is not None:
            raise ValueError("gradient='sampled' draws along the whole vocabulary; with tp_group use gradient='exact'")
        head = {**asdict(head_options), "bias": bias, "gradient": gradient, "epsilon": epsilon}
        token = linear_logp(hidden, weight, labels, **head)
        return _token_by_token(token, labels, cu_seqlens, ref_logps, pair_options, sp_name)
    inputs = (hidden, weight, bias, labels, ref_logps, cu_seqlens)
    options = (*astuple(head_options), *astuple(pair_options), tp_name, sp_name)
    return _unpack(LinearHDPOLoss.apply(*inputs, *options, compute_dtype(hidden), needs_grad(hidden, weight, bias)))


def _token_by_token(
    token: TokenLogp,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    options: PairOptions,
    sp_name: str | None,
) -> HDPOLoss:
    """The diagram as it stands, differentiated by autograd: c reaches `linear_logp` as the gradient of logp."""
    dtype, device = token.logp.dtype, token.logp.device
    scored = (labels != IGNORE_INDEX).to(device, dtype, non_blocking=True)
    values = (token.logp, token.entropy.detach(), scored)
    logps, entropy, lengths = (sum_over_ranks(sequence_sum(x, cu_seqlens), sp_name) for x in values)
    ref_logps = None if ref_logps is None else ref_logps.to(dtype)
    result = pair.evaluate(logps, ref_logps, lengths, options)
    return result._replace(entropy=entropy / lengths.clamp(min=1))


def _fake_linear_hdpo_loss(hidden, weight, bias, labels, ref_logps, cu_seqlens, *options):
    *_, dtype, needs = options
    full = full_precision(dtype)
    grads = zip((hidden, weight, bias), (dtype, full, full), needs, strict=True)
    results = _fake_results(hidden, cu_seqlens, full, any(needs))
    return *results, [t.new_empty(t.shape, dtype=d) for t, d, need in grads if need]


@operator(_fake_linear_hdpo_loss)
def _linear_hdpo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
    alpha: float,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    nll_weight: float,
    tp_name: str | None,
    sp_name: str | None,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """loss (), logps (S,), entropy (S,), rewards (S,), row_scale (N,), [d_hidden (N, H), d_weight (V, H), d_bias (V,)].

    Gradients are those that `needs` names: d_hidden still without row_scale, ∂loss/∂ℓ of each row's sequence; d_weight
    and d_bias in full precision.
    """
    options = PairOptions(alpha, beta, loss_type, label_smoothing, nll_weight)
    tp, sp = Ranks(tp_name), Ranks(sp_name)
    shard = VocabShard(tp, weight.shape[0], hidden.device)
    rows = ScoredRows(labels, shard.total, hidden.device)
    bounds = rows.boundaries(boundaries(cu_seqlens, hidden.shape[0]))
    with torch.autocast(hidden.device.type, enabled=False):
        head = LMHead(
            rows.select(hidden), weight, bias, shard.own_labels(rows.labels),
            HeadOptions(softcap, logit_scale, chunk_bytes), dtype, any(needs), shard=shard,
        )  # fmt: skip
        lengths = sp.sum(_scored_lengths(head.labels, bounds, head.dtype))
        ref_logps = None if ref_logps is None else ref_logps.to(head.dtype)
        logps, coefficients, d_hidden, d_weight = _one_pass(head, bounds, lengths, ref_logps, options, needs, sp)
        result = pair.evaluate(logps, ref_logps, lengths, options)
        entropy = sp.sum(backend(head.entropy).sequence_sum(head.entropy, bounds)) / lengths.clamp(min=1)
    grads = [] if d_hidden is None else [rows.spread(tp.sum(d_hidden))]
    grads += [acc for acc in d_weight.total() if acc is not None]
    row_scale = rows.spread(coefficients[sequence_of_row(bounds, hidden.device)]) if any(needs) else logps.new_empty(0)
    return result.loss, logps, entropy, _rewards(result), row_scale, grads


def _one_pass(
    head: LMHead,
    cu_seqlens: list[int],
    lengths: Tensor,  # (S,)
    ref_logps: Tensor | None,  # (S,)
    options: PairOptions,
    needs: list[bool],
    sp: Ranks,
) -> tuple[Tensor, Tensor, Tensor | None, WeightGrad]:
    """logps (S,), c (S,), d_hidden (N, H) to be multiplied by c of each row's sequence, d_weight.

    lengths, logps and c are of sequences over all ranks of sp, d_hidden and d_weight of the rows here.
    """
    num_pairs = len(cu_seqlens) // 2
    a, k = pair.sequence_coefficients(num_pairs, lengths, options)
    unit = options.gradient_unit(num_pairs)
    logps, coefficients = torch.zeros_like(lengths), torch.zeros_like(lengths)
    d_hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if needs[0] else None
    d_weight = WeightGrad(head, *needs[1:])
    spare = None  # a second buffer for d_weight, made when a long pair needs one

    most_rows = sp.highest([end - start for start, end in itertools.pairwise(cu_seqlens[::2])], lengths.device)
    for first, last, pieces in plan_chunks(cu_seqlens, head.piece_rows, most_rows):
        seqs = slice(2 * first, 2 * last)
        rows = slice(cu_seqlens[seqs.start], cu_seqlens[seqs.stop])
        bounds = [b - rows.start for b in cu_seqlens[seqs.start : seqs.stop + 1]]
        gathered = None  # of a pair in several pieces: Σ a_s g_tᵀ h_t, while f'(u) is not known yet
        if d_weight.wanted and len(pieces) > 1:
            if d_weight.empty and not options.nll_weight:
                gathered = d_weight  # nothing else is in it yet: the first long pair needs no second buffer
            else:
                gathered = spare = spare or WeightGrad(head, *needs[1:])
                gathered.empty = True

        for start, end, sequence in pieces:
            grad = head.score(start, end)
            if d_hidden is not None:
                torch.mm(grad, head.weight, out=d_hidden[start:end])
            if gathered is not None:
                gathered.add(head, grad, start, end, a[sequence].expand(end - start), unit)
                if options.nll_weight and (sequence, end) == (2 * first, cu_seqlens[2 * first + 1]):
                    # the chosen sequence is complete, and the nll term's share of it known
                    d_weight.fold(gathered, k[sequence] / a[sequence])

        logps[seqs] = sp.sum(backend(head.logp).sequence_sum(head.logp[rows], bounds))
        if not any(needs):
            continue
        slope = pair.slope(logps[seqs], None if ref_logps is None else ref_logps[seqs], lengths[seqs], options)
        coefficients[seqs] = a[seqs] * slope.repeat_interleave(2) + k[seqs]
        if gathered is d_weight:
            d_weight.scale(slope)
        elif gathered is not None:
            d_weight.fold(gathered, slope)
        elif d_weight.wanted and pieces:
            per_row = coefficients[seqs][sequence_of_row(bounds, lengths.device)]
            d_weight.add(head, grad, rows.start, rows.stop, per_row, unit)
    return logps, coefficients, d_hidden, d_weight


class LinearHDPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, *rest):
        *results, row_scale, grads = _linear_hdpo_loss(hidden, weight, bias, *rest)
        # Attributes, not saved tensors: a checkpointed region is not run again for what nobody needs.
        ctx.row_scale, ctx.grads, ctx.needs, ctx.num_inputs = row_scale, grads, rest[-1], 3 + len(rest)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        results: list[Tensor | None] = [None] * ctx.num_inputs
        if d_loss is None:
            return tuple(results)
        if ctx.grads is None:
            raise RuntimeError(_CONSUMED.format("linear_hdpo_loss"))
        wanted = [i for i, need in enumerate(ctx.needs) if need]
        for i, grad in zip(wanted, ctx.grads, strict=True):
            if i == 0:
                results[i] = grad.to(ctx.dtypes[i]).mul_((d_loss * ctx.row_scale).unsqueeze(1))
            else:
                results[i] = times(grad, d_loss, ctx.dtypes[i])
        ctx.grads = None
        return tuple(results)


def hdpo_loss(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    ref_logps: Tensor | None,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
) -> HDPOLoss:
    """The same loss from logits (N, V) of any floating dtype; other arguments and result as in `linear_hdpo_loss`.

    inplace: overwrite the logits with their gradient, so that no second (N, V) tensor exists. Allowed where nothing
    else reads them: a leaf that requires grad is refused, and autograd raises if an earlier operation saved them.

    Raises ValueError / TypeError for shapes, dtypes, devices, boundaries, labels or options that do not fit.
    """
    HeadOptions(softcap, logit_scale)  # checks them
    pair_options = PairOptions(alpha, beta, loss_type, label_smoothing, nll_weight)
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating of shape (N, V), got {logits.dtype} {tuple(logits.shape)}")
    base = logits if logits._base is None else logits._base
    if inplace and base.is_leaf and base.requires_grad:
        raise ValueError("inplace=True would overwrite a leaf that requires grad, or a view of one; pass inplace=False")
    if inplace and logits.stride(1) != 1:
        raise ValueError(f"inplace=True needs rows without gaps, got strides {logits.stride()}; pass inplace=False")
    check_labels(labels, logits.shape[0], logits.device)
    cu_seqlens = as_boundaries(cu_seqlens, pairs=True)
    check_ref_logps(ref_logps, cu_seqlens.shape[0] - 1, logits.device)
    if logits.stride(1) != 1:
        logits, inplace = logits.contiguous(), True  # row operations walk along rows; the copy is ours to overwrite
    inplace = inplace and not torch.compiler.is_compiling()  # a compiled graph's memory is the compiler's
    options = (softcap, logit_scale, *astuple(pair_options), *needs_grad(logits))
    return _unpack(LogitsHDPOLoss.apply(logits, labels, ref_logps, cu_seqlens, inplace, *options))


def _fake_hdpo_loss(logits, labels, ref_logps, cu_seqlens, *options):
    need = options[-1]
    results = _fake_results(logits, cu_seqlens, full_precision(logits.dtype), need)
    return *results, torch.empty_like(logits) if need else logits.new_empty(0)


@operator(_fake_hdpo_loss)
def _hdpo_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor,
    softcap: float | None,
    logit_scale: float,
    alpha: float,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    nll_weight: float,
    need: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (), logps (S,), entropy (S,), rewards (S,), row_scale (N,), d_logits (N, V) still without row_scale"""
    grad = torch.empty_like(logits) if need else logits.new_empty(0)
    options = PairOptions(alpha, beta, loss_type, label_smoothing, nll_weight)
    return *_from_logits(logits, labels, ref_logps, cu_seqlens, softcap, logit_scale, options, grad), grad


def _from_logits(
    logits: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor,
    softcap: float | None,
    logit_scale: float,
    options: PairOptions,
    grad: Tensor,  # (N, V) receives ∂logp/∂logits, may be the logits; empty: not wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_label_values(labels, logits.shape[1])
    bounds = boundaries(cu_seqlens, logits.shape[0])
    labels = labels.contiguous().to(logits.device, non_blocking=True)
    need, inplace = grad.shape == logits.shape, grad is logits
    stats = backend(logits).row_stats(
        logits, labels, softcap=softcap, logit_scale=logit_scale, grad_out=grad if need else None, overwrite=inplace
    )
    lengths = _scored_lengths(labels, bounds, stats.logp.dtype)
    ref_logps = None if ref_logps is None else ref_logps.to(stats.logp.dtype)
    logps = backend(stats.logp).sequence_sum(stats.logp, bounds)
    result = pair.evaluate(logps, ref_logps, lengths, options)
    entropy = backend(logps).sequence_sum(stats.entropy, bounds) / lengths.clamp(min=1)
    row_scale = logps.new_empty(0)
    if need:
        a, k = pair.sequence_coefficients(len(logps) // 2, lengths, options)
        coefficients = a * pair.slope(logps, ref_logps, lengths, options).repeat_interleave(2) + k
        row_scale = coefficients[sequence_of_row(bounds, logits.device)]
    return result.loss, logps, entropy, _rewards(result), row_scale


class LogitsHDPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ref_logps, cu_seqlens, inplace, *options):
        inputs = (logits, labels, ref_logps, cu_seqlens)
        if inplace:
            softcap, logit_scale, *pair_options, need = options
            grad = logits if need else logits.new_empty(0)
            *results, row_scale = _from_logits(*inputs, softcap, logit_scale, PairOptions(*pair_options), grad)
            torch.autograd.graph.increment_version(logits)  # kernels do not; autograd must know that they are gone
        else:
            *results, row_scale, grad = _hdpo_loss(*inputs, *options)
        ctx.grad, ctx.row_scale, ctx.num_inputs = grad, row_scale, 5 + len(options)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        none = (None,) * (ctx.num_inputs - 1)
        if d_loss is None:
            return None, *none
        if ctx.grad is None:
            raise RuntimeError(_CONSUMED.format("hdpo_loss"))
        d_logits = ctx.grad.mul_((d_loss * ctx.row_scale).unsqueeze(1))
        ctx.grad = None
        return d_logits, *none


_CONSUMED = (
    "the gradients of {} are formed in forward and consumed by the first backward; "
    "call it again for another backward (retain_graph=True cannot keep them)"
)


def _scored_lengths(labels: Tensor, cu_seqlens: list[int], dtype: torch.dtype) -> Tensor:
    """(S,) scored tokens of each sequence."""
    scored = (labels != IGNORE_INDEX).to(dtype)
    return backend(scored).sequence_sum(scored, cu_seqlens)


def _rewards(result: HDPOLoss) -> Tensor:
    """(S,), since results of an operator share no memory."""
    return torch.stack([result.chosen_rewards, result.rejected_rewards], 1).flatten()


def _unpack(results: tuple[Tensor, ...]) -> HDPOLoss:
    loss, logps, entropy, rewards = results
    chosen, rejected = rewards[0::2], rewards[1::2]
    return HDPOLoss(loss, logps, entropy, chosen, rejected, chosen - rejected)


def _fake_results(like: Tensor, cu_seqlens: Tensor, dtype: torch.dtype, need: bool) -> tuple[Tensor, ...]:
    num_sequences = cu_seqlens.shape[0] - 1
    shapes = ((), num_sequences, num_sequences, num_sequences, like.shape[0] if need else 0)
    return tuple(like.new_empty(shape, dtype=dtype) for shape in shapes)
