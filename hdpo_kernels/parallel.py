"""Heads on several ranks: the vocabulary cut over `tp_group`, or tokens of the same sequences spread over `sp_group`.

tp_group    every rank has all rows of hidden and its own rows of weight. Statistics of a row of logits are merged from
            those of its shards, one gather per tile of logits; d_hidden is summed over the ranks.
sp_group    every rank has its own rows of hidden, of the same S sequences, and all of weight. Sums over sequences are
            summed over the ranks before the loss, once per chunk of pairs.

Gathered numbers are merged in the order of ranks, so that all ranks see the same bits.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from hdpo_kernels.naive import IGNORE_INDEX


class Ranks:
    """A process group, or one rank alone: then everything is returned as it is."""

    def __init__(self, name: str | None) -> None:
        # Operators take no process groups, but their names.
        self.group = None if name is None else dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks; in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """(…) -> (ranks, …)"""
        assert self.group is not None
        gathered = tensor.new_empty(dist.get_world_size(self.group), *tensor.shape)
        dist.all_gather(list(gathered), tensor.contiguous(), group=self.group)
        return gathered

    def highest(self, values: list[int], device: torch.device) -> list[int]:
        """The largest on any rank, one by one; on an accelerator that costs a device sync."""
        if self.group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()


class VocabShard:
    """Which part of the vocabulary is on this rank: all of it, or a run of entries, in the order of ranks.

    With a group, finding out costs a device sync.
    """

    def __init__(self, ranks: Ranks, size: int, device: torch.device) -> None:
        self.size, self._ranks = size, ranks
        self.cut = ranks.group is not None
        sizes, rank = [size], 0
        if ranks.group is not None:
            sizes = ranks.gather(torch.tensor([size], device=device)).flatten().tolist()
            rank = dist.get_rank(ranks.group)
        self.first, self.largest, self.total = sum(sizes[:rank]), max(sizes), sum(sizes)

    def own_labels(self, labels: Tensor) -> Tensor:
        """Labels as indices into this shard; those of other shards as one that it does not have."""
        if not self.cut:
            return labels
        own = labels - self.first
        own = own.masked_fill((own < 0) | (own >= self.size), self.size)
        return own.masked_fill(labels == IGNORE_INDEX, IGNORE_INDEX)

    def merge(self, stats: Tensor) -> Tensor:
        """Statistics (5, n) of rows of logits from those of this shard; see `merge_stats`."""
        return merge_stats(self._ranks.gather(stats))


def merge_stats(stats: Tensor) -> Tensor:
    """(R, 5, n) -> (5, n): statistics of rows whose vocabulary is cut into R shards.

    The five of a row: m = max z; log Σ e^(z − m); the label's log-probability, NaN in shards without the label;
    entropy, both by the shard's own softmax; whether the label's logit is the shard's m, 1 or 0.
    """
    m, log_total, logp, entropy, is_top1 = stats.unbind(1)
    top = m.amax(0)
    shift = m - top
    off = m == -torch.inf  # a shard that is switched off
    share = (shift + log_total).masked_fill(off, -torch.inf).exp()  # Σ e^(z − top) of each shard
    total = share.sum(0)
    log_all = total.log()
    mean = torch.where(share == 0, 0.0, share * (log_total - entropy + shift)).sum(0) / total  # of z − top
    of_label = logp + log_total + shift
    no_label = of_label.isnan()
    label = of_label.masked_fill(no_label, 0).sum(0).masked_fill(no_label.all(0), torch.nan)
    label = label - log_all
    # by logits, not by merged log-probs, which are rounded
    is_top1 = is_top1.masked_fill(m < top, 0).amax(0).masked_fill(label.isnan(), 0)
    return torch.stack([top, log_all, label, log_all - mean, is_top1])
