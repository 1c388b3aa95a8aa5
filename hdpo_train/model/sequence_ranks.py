"""One packed row over several processes: each has a run of its tokens, and in attention some heads of all of them.

    row ── own_tokens ──> embeddings, norms, MLPs, LM head: of this rank's tokens alone
                          attention: tokens of all heads ── exchange ──> some heads of all tokens, by documents as ever
                                     and back again
    log-probs of a sequence ── summed over the ranks ──> the loss, the same on all of them

This is what DeepSpeed calls Ulysses. Ranks are contiguous: of four processes with size 2, {0, 1} and {2, 3} have one
row each. The rest of the run knows them as ranks of data that happen to have the same batch (see `hdpo_train.ranks`).
"""

import math
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from hdpo_train.model.attention import attends_by_documents
from hdpo_train.model.loading import backbone_of, evaluating, varies_beyond
from hdpo_train.model.packing import Layout, OnHost, Places, backbone_inputs, lay_out

_PAIRS = [(range(3, 10), range(10, 15), range(15, 17)), (range(20, 21), range(21, 22), range(22, 30))]  # of the probe
Exchange = Callable[[Tensor], Tensor]


class SequenceRanks:
    """The processes that share every row.

    No tuple and no dataclass, in which FSDP would look for tensors.

    Args:
        group: of this process; gloo's or NCCL's.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def own_tokens(self, batch: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch of one packed row: tokens, places and labels. Documents stay those of the row.

        The row grows by less than `size` tokens, as a document of its own that nothing reads, so that all ranks have
        equally many. A rank may have no label of a sequence, or none at all.
        """
        row, places, rows = batch["input_ids"][0], batch["position_ids"][0], batch["rows"].cpu()
        more = -len(row) % self.size
        row = torch.cat([row, row[:1].expand(more)])
        places = torch.cat([places, torch.arange(more, device=places.device)])
        own = slice(self.rank * (len(row) // self.size), (self.rank + 1) * (len(row) // self.size))
        here = (rows >= own.start) & (rows < own.stop)
        labels = batch["labels"].tensor
        counts = [int(here[start:end].sum()) for start, end in pairwise(batch["cu_seqlens"])]
        return {
            **batch,
            "input_ids": row[None, own],
            "position_ids": places[None, own],
            "documents": batch["documents"] + [(more,)] * (more > 0),
            "rows": rows[here] - own.start,
            "labels": OnHost(labels[here]),
            "cu_seqlens": [0, *accumulate(counts)],
        }

    def attend(
        self, function: Callable[..., Tensor], module: nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """function(module, query, key, value) on some heads of the whole row: (1, heads, R / size, D) in and
        (1, R / size, heads, D) out.

        Key heads that are too few to be dealt out are copied as often as it takes.
        """
        copies = self.size // math.gcd(self.size, key.shape[1])
        if copies > 1:
            key, value = (tensor.repeat_interleave(copies, 1) for tensor in (key, value))
            module = _WithGroups(module, query.shape[1] // key.shape[1])  # type: ignore[assignment]
        output = function(module, *_Permuted.apply(self.to_heads, self.to_tokens, query, key, value))
        (output,) = _Permuted.apply(self.to_tokens, self.to_heads, output.transpose(1, 2))  # type: ignore[no-untyped-call]
        return output.transpose(1, 2)

    def to_heads(self, tensor: Tensor) -> Tensor:
        """(1, heads, R / size, D) -> (1, heads / size, R, D)"""
        parts = tensor[0].unflatten(0, (self.size, -1))  # of each rank's heads
        return self._exchange(parts).transpose(0, 1).flatten(1, 2)[None]

    def to_tokens(self, tensor: Tensor) -> Tensor:
        """(1, heads / size, R, D) -> (1, heads, R / size, D)"""
        parts = tensor[0].unflatten(1, (self.size, -1)).transpose(0, 1)  # of each rank's tokens
        return self._exchange(parts).flatten(0, 1)[None]

    def _exchange(self, parts: Tensor) -> Tensor:
        """(size, …), one for each rank -> the same, one from each."""
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        return received


class _WithGroups:
    """An attention module whose queries share keys in groups of another size."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self._module, self.num_key_value_groups = module, groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Permuted(torch.autograd.Function):
    """Tensors whose numbers are permuted over all ranks by `there`, and their gradients by `back`, its inverse.

    Tensors that are exchanged together are one node of the graph: ranks must not come to different orders in backward.
    """

    @staticmethod
    def forward(ctx: Any, there: Exchange, back: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.back = back
        return tuple(map(there, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *map(ctx.back, grads)


def check_model(model: PreTrainedModel, layout: Layout, size: int, longest: int) -> None:
    """Raise ValueError, with the way out, if by its config the model cannot run rows that are split over `size` ranks.

    longest: tokens of the longest sequence.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    if not layout.packed or not attends_by_documents(config):
        raise ValueError(
            f"sp_size={size} needs packed rows and attn_implementation sdpa or eager; {name} has "
            f"{layout} batches and {config._attn_implementation}"
        )
    if config.num_attention_heads % size:
        raise ValueError(
            f"sp_size={size} deals out the attention heads of {name}, and {config.num_attention_heads} cannot be "
            "divided by it: take a size that divides them"
        )
    varies = varies_beyond(model.config)
    if varies is not None and longest > varies:
        raise ValueError(
            f"beyond {varies} tokens the rotary positions of {name} depend on the longest sequence, which no rank of "
            f"sp_size={size} sees whole: give max_length={varies} or less"
        )


@torch.no_grad()
def probe(model: PreTrainedModel, layout: Layout, ranks: SequenceRanks) -> None:
    """Raise ValueError unless tokens get the hidden states that they get in a whole row; to be called by all ranks."""
    vocab, device = model.config.get_text_config().vocab_size, model.get_output_embeddings().weight.device
    pairs: list[Any] = [tuple([token % vocab for token in part] for part in pair) for pair in _PAIRS]
    row = lay_out(pairs, layout, 0)

    def hidden(batch: dict[str, Any], ranks: SequenceRanks | None) -> Tensor:
        places = Places(batch["position_ids"].to(device), batch["documents"], ranks)
        inputs = backbone_inputs(model, places)
        return backbone_of(model)(input_ids=batch["input_ids"].to(device), use_cache=False, **inputs).last_hidden_state

    cannot = f"{type(model).__name__} cannot be split by sp_size={ranks.size}"
    with evaluating(model):
        whole = hidden(row, None)[0].float()
        try:
            own = hidden(ranks.own_tokens(row), ranks)[0].float()
        except RuntimeError as error:  # of shapes, as where each head has a weight beside those of its projections
            raise ValueError(f"{cannot}: {str(error).partition(chr(10))[0]}") from error
    expected = whole[ranks.rank * len(own) : (ranks.rank + 1) * len(own)]
    difference = (own[: len(expected)] - expected).norm() / whole.norm()
    if not difference < (1e-4 if model.dtype == torch.float32 else 5e-2):  # measured: 1e-7 and 4e-3
        raise ValueError(
            f"{cannot}: its hidden states are then off by {difference:.0%}. Either the ranks have different weights, "
            "or its layers look at other tokens elsewhere than in attention"
        )
