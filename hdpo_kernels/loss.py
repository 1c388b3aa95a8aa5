"""The H-DPO loss with its gradients in one pass: 3 GEMMs, nothing recomputed, memory bounded at any length.

    hidden, weight, labels ── LMHead.score ──> logp, entropy (N,) ── score_pairs ──> logps (S,), terms (P,) ──> loss ()
    d_hidden, d_weight <──── row_scale (N,): of each sequence one scalar, c = a · f'(u) + k <──┘

N scored rows, V vocabulary, H hidden size, S = 2P sequences interleaved chosen, rejected.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hdpo_kernels import pair
from hdpo_kernels.checks import as_boundaries, boundaries, check_gradient, check_head, check_ref_logps
from hdpo_kernels.chunks import plan_chunks
from hdpo_kernels.device import on_device
from hdpo_kernels.lm_head import HeadOptions, LMHead, ScoredRows, WeightGrad, full_precision
from hdpo_kernels.logp import compute_dtype, linear_logp, needs_grad
from hdpo_kernels.naive import HDPOLoss
from hdpo_kernels.objectives import ALL, NONE, TWO
from hdpo_kernels.ops import operator
from hdpo_kernels.pair import LossFunction, PairOptions
from hdpo_kernels.pairs import pair_operation
from hdpo_kernels.pairs.loss import CONSUMED, fake_results, own_loss, results, token_hdpo_loss, unpack
from hdpo_kernels.pairs.scored import Pairs, ScoredStats, new_pairs
from hdpo_kernels.pairs.torch import scored_lengths
from hdpo_kernels.parallel import Ranks, VocabShard
from hdpo_kernels.rows import backend

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
    loss_type: str | Sequence[str] | LossFunction = "sigmoid",
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    alpha_level: str = "sequence",
    loss_weights: Sequence[float] | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
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

    N scored rows, H hidden size, V vocabulary, S = 2P sequences, chosen and rejected in turn. Exact gradients are
    formed in forward where they are needed, and consumed by the first backward. A NaN or inf in the input comes out as
    a NaN loss; a sequence without scored rows, or no pair at all, counts as zero.

    Args:
        hidden: (N, H) fp32, bf16, fp16 or fp64. Under autocast hidden and weight are cast to its dtype.
        weight: (V, H) of the LM head, of hidden's dtype.
        labels: (N,) int64, -100 = not scored, on hidden's device or the CPU. On the CPU they are checked, and rows that
            are not scored skip the head; elsewhere a label outside the vocabulary makes the loss NaN.
        cu_seqlens: (S + 1,) int, boundaries of the sequences in N; a list, or a tensor on the CPU (on another device it
            costs one sync). Under torch.compile pass a CPU tensor: a list is compiled into the graph.
        ref_logps: (S,) log-probabilities of the reference policy, nats; None: zeros.
        alpha: weight of the policy's log-probabilities; < 1 sharpens, 1 is DPO, > 1 diversifies.
        beta: strength of the pull to the reference.
        loss_type: one of `pair.LOSS_TYPES` (equations: `objectives.py`), or several, whose sum is the loss; or a
            function of α-weighted log-probabilities (S,), reference log-probabilities (S,) and lengths (S,),
            differentiable in the first, which returns the loss of each pair (P,) or their mean (). A function, and the
            losses of all pairs together ("aot", "aot_unpaired"), compute logits twice: 4 GEMMs.
        label_smoothing: probability in [0, 0.5) that a preference label is flipped, for losses that have it.
        nll_weight: adds that times the chosen sequences' mean negative log-likelihood per token.
        alpha_level: "sequence", or "token": α acts on log-probabilities per token, z_p has α_s = 1 + (α − 1) n̄_p / n_s
            in α's place (n_s scored tokens of the sequence, n̄_p the mean of the pair's two).
        loss_weights: a weight for each of several losses; default: 1 each.
        f_divergence_type, f_alpha_divergence_coef, discopop_tau: see `pair_loss`.
        bias: (V,) of the LM head.
        softcap: cap of the logits by tanh; None: no cap.
        logit_scale: factor on the logits.
        gradient: "exact", 3 GEMMs; or "sampled", 1 GEMM: rows of ∂loss/∂logits are rounded, without bias, to at most
            1/epsilon + 2 entries (see `linear_logp`).
        epsilon: of "sampled", in (0, 0.5]; smaller is less noise and more entries.
        chunk_bytes: most bytes of logits and their gradient held at a time (on a CPU kept for the thread's next call).
        tp_group: ranks that each have a run of rows of weight (and bias), in the order of ranks, and the same hidden
            and labels (numbers of the whole vocabulary). Every rank gets the loss, all of d_hidden, and d_weight of its
            rows.
        sp_group: ranks that each have some tokens of the same S sequences, cu_seqlens being this rank's (a sequence may
            have none here), and all of weight. Every rank gets the loss, its d_hidden, and its tokens' part of
            d_weight, which is to be summed over the group like the gradients of the rest of the model.

    Returns:
        HDPOLoss(loss, logps, entropy, chosen_rewards, rejected_rewards, margins, accuracy); only `loss` carries a
        gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, boundaries, labels or options that do not fit.
    """
    head_options = HeadOptions(softcap, logit_scale, chunk_bytes)
    pair_options = PairOptions(
        alpha, beta, "sigmoid" if callable(loss_type) else loss_type, label_smoothing, nll_weight, alpha_level,
        loss_weights, f_divergence_type, f_alpha_divergence_coef, discopop_tau,
    )  # fmt: skip
    check_head(hidden, weight, labels, bias)
    check_gradient(gradient, epsilon, weight.shape[0])
    cu_seqlens = as_boundaries(cu_seqlens, pairs=True)
    check_ref_logps(ref_logps, cu_seqlens.shape[0] - 1, hidden.device)
    tp_name, sp_name = (None if group is None else group.group_name for group in (tp_group, sp_group))
    if callable(loss_type):
        pair_options.check_own_loss()
        if sp_name is not None:
            raise ValueError("with sp_group a loss_type that is a function of your own is not supported")
    if gradient == "sampled" or callable(loss_type) or pair_options.kind == ALL:
        if tp_name is not None:
            what = (
                "gradient='sampled' draws along the whole vocabulary"
                if gradient == "sampled"
                else ("a loss of all pairs together computes logits twice")
            )
            raise ValueError(f"{what}; with tp_group use gradient='exact' and another loss_type")
        token = linear_logp(
            hidden,
            weight,
            labels,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            gradient=gradient,
            epsilon=epsilon,
            chunk_bytes=chunk_bytes,
        )
        if callable(loss_type):
            return own_loss(token, labels, cu_seqlens, ref_logps, pair_options, loss_type)
        return token_hdpo_loss(token, labels, cu_seqlens, ref_logps, pair_options, sp_name)
    inputs = (hidden, weight, bias, labels, ref_logps, cu_seqlens)
    options = (*head_options.arguments, pair_options.numbers, tp_name, sp_name)
    return unpack(LinearHDPOLoss.apply(*inputs, *options, compute_dtype(hidden), needs_grad(hidden, weight, bias)))


def _fake_linear_hdpo_loss(hidden, weight, bias, labels, ref_logps, cu_seqlens, *options):
    *_, dtype, needs = options
    full = full_precision(dtype)
    values = fake_results(hidden, cu_seqlens, full, any(needs))
    grads = zip((hidden, weight, bias), (dtype, full, full), needs, strict=True)
    return *values, [t.new_empty(t.shape, dtype=d) for t, d, need in grads if need]


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
    loss_numbers: list[float],
    tp_name: str | None,
    sp_name: str | None,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """loss (), logps (S,), entropy (S,), accuracy (S,), rewards (S,), margins (P,), row_scale (N,), gradients.

    Gradients are those of d_hidden (N, H), d_weight (V, H), d_bias (V,) that `needs` names: d_hidden still without
    row_scale, ∂loss/∂ℓ of each row's sequence; d_weight and d_bias in full precision.
    """
    options = PairOptions.from_numbers(loss_numbers)
    tp, sp = Ranks(tp_name), Ranks(sp_name)
    shard = VocabShard(tp, weight.shape[0], hidden.device)
    boundaries(cu_seqlens, hidden.shape[0])
    rows = ScoredRows(labels, shard.total, hidden.device, cu_seqlens)
    head_options = HeadOptions(softcap, logit_scale, chunk_bytes)
    head = LMHead(hidden, weight, bias, rows, head_options, dtype, any(needs), shard=shard)
    pairs, d_hidden, d_weight = _one_pass(head, rows, ref_logps, options, needs, sp)
    grads = [] if d_hidden is None else [rows.spread(tp.sum(d_hidden))]
    grads += [acc for acc in d_weight.total() if acc is not None]
    if any(needs):
        pairs = pairs._replace(row_scale=rows.spread(pairs.row_scale))
    return *results(pairs), grads


def _one_pass(
    head: LMHead,
    scored: ScoredRows,
    ref_logps: Tensor | None,  # (S,)
    options: PairOptions,
    needs: list[bool],
    sp: Ranks,
) -> tuple[Pairs, Tensor | None, WeightGrad]:
    """Pairs, of sequences over all ranks of sp; of the rows here d_hidden, still without row_scale, and d_weight."""
    assert scored.cu_seqlens is not None
    bounds = scored.bounds
    rows = ScoredStats(head.stats, head.labels, bounds, scored.cu_seqlens, ref_logps, scored.all_scored)
    score_pairs, num_pairs = pair_operation(head.stats).score_pairs, len(bounds) // 2
    pairs = None
    d_hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if needs[0] else None
    d_weight = WeightGrad(head, *needs[1:])
    spares: list[WeightGrad] = []  # more buffers for d_weight, made when a long pair needs them
    apart = options.kind == TWO  # chosen and rejected have derivatives of their own

    most_rows = sp.highest([end - start for start, end in itertools.pairwise(bounds[::2])], head.hidden.device)
    chunks = plan_chunks(bounds, head.piece_rows, most_rows)
    in_parts = d_weight.wanted and any(len(chunk.pieces) > 1 for chunk in chunks)
    likelihood = any(loss.of == NONE for loss, _ in options.losses)  # a mean over the tokens of all chosen sequences
    if in_parts or sp.group is not None or likelihood:
        rows = rows._replace(lengths=sp.sum(scored_lengths(rows, slice(0, 2 * num_pairs))))
    a = gathering = head.stats[0]  # those of sequences, where a pair is cut
    k: Tensor | None = None
    # only fp16 is too short of exponents for a coefficient
    unit = options.gradient_unit(bounds) if head.hidden.dtype == torch.float16 else 1.0
    if in_parts and rows.lengths is not None and apart:
        gathering = torch.full_like(rows.lengths, 1 / unit)
    elif in_parts and rows.lengths is not None:
        a, k = pair.sequence_coefficients(num_pairs, rows.lengths, options)
        gathering = a
        if k is not None and options.alpha_level == "token":
            # the chosen's gathered sum is divided by its coefficient, which must not be zero then
            by_sequence, _ = pair.sequence_coefficients(
                num_pairs, rows.lengths, replace(options, alpha_level="sequence")
            )
            gathering = torch.stack([by_sequence[0::2], a[1::2]], 1).flatten()

    for first, last, pieces in chunks:
        gathered: list[WeightGrad] = []  # of a pair in several pieces: Σ a_s g_tᵀ h_t, while its loss is not known yet
        if d_weight.wanted and len(pieces) > 1:
            if d_weight.empty and k is None:
                gathered.append(d_weight)  # nothing else is in it yet: the first long pair needs a buffer less
            while len(gathered) < 1 + apart:
                number = len(gathered) - (d_weight in gathered)
                if number == len(spares):
                    spares.append(WeightGrad(head, *needs[1:]))
                spares[number].empty = True
                gathered.append(spares[number])

        for start, end, sequence in pieces:
            grad = head.score(start, end)
            if d_hidden is not None:
                torch.mm(grad, head.weight, out=d_hidden[start:end])
            if gathered:
                into = gathered[(sequence - 2 * first) if apart else 0]
                into.add(head, grad, start, end, gathering[sequence].expand(end - start), unit)
                if k is not None and (sequence, end) == (2 * first, bounds[2 * first + 1]):
                    # the chosen sequence is complete, and the likelihood's share of it known
                    d_weight.fold(into, k[sequence] / gathering[sequence])
                    if gathering is not a:
                        into.scale(a[sequence] / gathering[sequence])

        pairs = score_pairs(pairs, first, last, rows, options, sp, any(needs))
        for sequence, each in enumerate(gathered, 2 * first):
            factor = pairs.slope[first]
            if apart:
                if bounds[sequence] == bounds[sequence + 1]:  # it has no row, here
                    continue
                factor = pairs.row_scale[bounds[sequence]] / gathering[sequence]
            d_weight.scale(factor) if each is d_weight else d_weight.fold(each, factor)
        if not gathered and d_weight.wanted and pieces:
            start, end = bounds[2 * first], bounds[2 * last]
            d_weight.add(head, grad, start, end, pairs.row_scale[start:end], unit)
    pairs = new_pairs(rows, any(needs)) if pairs is None else pairs
    return pairs, d_hidden, d_weight


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
            raise RuntimeError(CONSUMED.format("linear_hdpo_loss"))
        wanted = [i for i, need in enumerate(ctx.needs) if need]
        rows = backend(ctx.row_scale)
        with on_device(d_loss.device):
            for i, grad in zip(wanted, ctx.grads, strict=True):
                if i == 0:
                    results[i] = rows.scale_rows(grad, ctx.row_scale, factor=d_loss, dtype=ctx.dtypes[i], inplace=True)
                else:
                    results[i] = rows.times(grad, d_loss, ctx.dtypes[i])
        ctx.grads = None
        return tuple(results)
