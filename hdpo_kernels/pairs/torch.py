"""The pair operation with torch alone: CPU, MPS, fp64, and sequences that several ranks share."""

import itertools

import torch
from torch import Tensor

from hdpo_kernels import pair
from hdpo_kernels.device import to_device
from hdpo_kernels.naive import IGNORE_INDEX
from hdpo_kernels.pair import PairOptions
from hdpo_kernels.pairs.scored import Pairs, ScoredStats, new_pairs
from hdpo_kernels.parallel import Ranks
from hdpo_kernels.rows import backend


def score_pairs(
    out: Pairs | None, first: int, last: int, rows: ScoredStats, options: PairOptions, sp: Ranks, need: bool
) -> Pairs:
    """Pairs first … last - 1, their rows all scored by now; sums over sequences are summed over the ranks of sp.

    out: what the calls for other pairs returned, None for the first. need: row_scale is wanted.
    """
    num_pairs = len(rows.bounds) // 2
    if last - first < num_pairs or not num_pairs:
        out = new_pairs(rows, need) if out is None else out
        if first == last:
            return out
    seqs = slice(2 * first, 2 * last)
    here = slice(rows.bounds[seqs.start], rows.bounds[seqs.stop])
    bounds = [b - here.start for b in rows.bounds[seqs.start : seqs.stop + 1]]
    operations = backend(rows.stats)
    lengths = sp.sum(scored_lengths(rows, seqs)) if rows.lengths is None else rows.lengths[seqs]
    logps, *others = sp.sum(operations.sequence_sum(rows.stats[:, here], bounds)).unbind(0)
    ref_logps = None if rows.ref_logps is None else rows.ref_logps[seqs].to(logps.dtype)
    tokens = None if rows.lengths is None else rows.lengths[0::2].sum()  # of all chosen sequences
    scored = pair.score(logps, ref_logps, lengths, options, num_pairs, tokens)
    entropy, accuracy = (sums / lengths.clamp(min=1) for sums in others)
    row_scale = rows.stats[0, :0]
    if need:
        a, k = pair.sequence_coefficients(num_pairs, lengths, options, scored.alphas, tokens)
        if scored.by_sequence is None:
            c = (a.view(-1, 2) * scored.slope.unsqueeze(1)).flatten()
        else:
            c = scored.alphas * scored.by_sequence / max(num_pairs, 1)
        c = c if k is None else c + k
        row_scale = operations.sequence_spread(c, bounds)
    part = Pairs(scored.terms, scored.slope, logps, entropy, accuracy, scored.rewards, scored.margins, row_scale)
    if out is None:
        return part
    pairs = slice(first, last)
    places = (pairs, pairs, seqs, seqs, seqs, seqs, pairs, here if need else slice(None))
    for whole, place, values in zip(out, places, part, strict=True):
        whole[place] = values
    return out


def scored_lengths(rows: ScoredStats, seqs: slice) -> Tensor:
    """Scored tokens of the sequences."""
    bounds = rows.bounds[seqs.start : seqs.stop + 1]
    if rows.all_scored:
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        (on_device,) = to_device([torch.tensor(lengths, dtype=torch.int64, device="cpu")], rows.stats.device)
        return on_device.to(rows.stats.dtype)
    scored = (rows.labels[bounds[0] : bounds[-1]] != IGNORE_INDEX).to(rows.stats.dtype)
    return backend(scored).sequence_sum(scored, [b - bounds[0] for b in bounds])
