"""Attention by documents: no mask of R × R, and nothing computed that such a mask would throw away.

    [prompt, chosen] [prompt, rejected]     one causal call each
    [prompt | chosen | rejected]            one on [prompt, chosen], one on [prompt, rejected], whose prompt is dropped

transformers lets an attention function be registered by name. `<name>_documents` here is the function called <name>
(sdpa, eager), on one sequence after the other: where a layer expects its mask it gets `Documents`. Any other mask goes
to the function itself, so that a model generates as before.

sdpa is called without a mask: its kernels then take memory linear in the length and skip the upper half. A sliding
window goes block by block, so that it is linear in time too. The eager function, which models with softcapped scores or
sinks need, runs on a block of queries at a time and again in backward: linear in memory.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_SUFFIX = "_documents"
_WINDOW_BLOCK = 512  # queries of a sliding window at a time
_SCORES = 2**24  # that the eager function holds at a time, over all heads
Function = Callable[..., tuple[Tensor, Any]]


class Documents(BlockMask):
    """The documents of a packed row, where an attention layer expects its mask.

    transformers gives a BlockMask of four dimensions to the layers as it is. Nothing else of one is in here.

    Args:
        lengths: of each document in order, tokens of (sequence,) or of (prompt, chosen, rejected).
        window: positions that a token sees, its own included; None: all before it.
        ranks: a SequenceRanks if the layer has only this process's tokens of the row.
    """

    def __init__(self, lengths: list[tuple[int, ...]], window: int | None = None, ranks: Any = None) -> None:
        self.lengths, self.window, self.ranks = lengths, window, ranks

    @property
    def shape(self) -> tuple[int, ...]:
        total = sum(map(sum, self.lengths))
        return 1, 1, total, total

    ndim = 4

    def to(self, *_: Any, **__: Any) -> "Documents":
        return self  # hooks that spread a model over devices move what they can

    def __repr__(self) -> str:
        return f"Documents({self.lengths}, window={self.window})"

    __str__ = __repr__


def can_attend_by_documents(config: Any) -> bool:
    return _base(config) in _FUNCTIONS


def attends_by_documents(config: Any) -> bool:
    return config._attn_implementation.endswith(_SUFFIX)


def attend_by_documents(config: Any, wanted: bool = True) -> None:
    """Make a model of this config use the attention functions here, or its own again."""
    config._attn_implementation_internal = _base(config) + _SUFFIX * wanted


def _base(config: Any) -> str:
    return config._attn_implementation.removesuffix(_SUFFIX)


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    if not isinstance(mask, Documents):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    causal = functools.partial(_causal_sdpa, mask.window, {**kwargs, "is_causal": True})
    return _by_documents(causal, module, query, key, value, mask), None


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    function = sys.modules[type(module).__module__].eager_attention_forward  # every model has one of its own
    if not isinstance(mask, Documents):
        return function(module, query, key, value, mask, **kwargs)
    causal = functools.partial(_causal_eager, functools.partial(function, **kwargs), mask.window)
    return _by_documents(causal, module, query, key, value, mask), None


_FUNCTIONS = {"sdpa": _sdpa, "eager": _eager}
for _name, _function in _FUNCTIONS.items():
    AttentionInterface.register(_name + _SUFFIX, _function)
    AttentionMaskInterface.register(_name + _SUFFIX, ALL_MASK_ATTENTION_FUNCTIONS[_name])


@torch.compiler.disable  # lengths differ with every batch, and would be constants of a compiled graph
def _by_documents(
    causal: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor],
    module: nn.Module,
    query: Tensor,  # (1, heads, R, D); of several ranks, this one's run of R
    key: Tensor,  # (1, key heads, R, D)
    value: Tensor,
    documents: Documents,
) -> Tensor:
    """(1, R, heads, D)"""
    row = functools.partial(_row, causal, documents)
    if documents.ranks is not None:
        return documents.ranks.attend(row, module, query, key, value)
    return row(module, query, key, value)


def _row(
    causal: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor],
    documents: Documents,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    outputs: list[Tensor] = []
    sizes = [sum(lengths) for lengths in documents.lengths]
    rows = zip(*(tensor.split(sizes, 2) for tensor in (query, key, value)), strict=True)
    for lengths, row in zip(documents.lengths, rows, strict=True):
        if len(lengths) == 1:
            outputs.append(causal(module, *row))
            continue
        prompt, chosen, rejected = lengths
        outputs.append(causal(module, *(part[:, :, : prompt + chosen] for part in row)))
        if rejected:
            parts = (part.split([prompt, chosen, rejected], 2) for part in row)
            outputs.append(causal(module, *(torch.cat([part[0], part[2]], 2) for part in parts))[:, prompt:])
    return torch.cat(outputs, 1)


def _causal_sdpa(
    window: int | None, kwargs: dict[str, Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    length = query.shape[2]
    if window is None or length <= window:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)[0]
    return torch.cat(
        [
            sdpa_attention_forward(module, *parts, **kwargs)[0]
            for parts in _blocks(query, key, value, window, _WINDOW_BLOCK)
        ],
        1,
    )


def _causal_eager(
    function: Function, window: int | None, module: nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    heads, length = query.shape[1:3]
    most = _SCORES / heads
    block = most / length
    if window is not None and window < length:  # a block of queries sees as many keys more than the window
        block = max(block, (math.sqrt(window**2 + 4 * most) - window) / 2)
    block = max(int(block), 1)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        unseen = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        return function(module, query, key, value, unseen.masked_fill_(~mask, torch.finfo(query.dtype).min))[0]

    outputs = []
    for parts in _blocks(query, key, value, window or length, block):
        again = block < length and torch.is_grad_enabled()
        outputs.append(checkpoint(attend, *parts, use_reentrant=False) if again else attend(*parts))
    return torch.cat(outputs, 1)


def _blocks(
    query: Tensor, key: Tensor, value: Tensor, window: int, block: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Blocks of queries, the keys and values that any of them sees, and a mask (1, 1, queries, keys)."""
    length, device = query.shape[2], query.device
    count = -(-length // block)
    keys, values = _Sum(count), _Sum(count)
    for start, queries in zip(range(0, length, block), query.split(block, 2), strict=True):
        end, first = start + queries.shape[2], max(start - window + 1, 0)
        back = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
        seen, mask = slice(first, end), ((back >= 0) & (back < window))[None, None]
        yield queries, _Part.apply(key, seen, keys), _Part.apply(value, seen, values), mask


class _Sum:
    """The sum of the gradients of a known number of parts of one tensor."""

    def __init__(self, parts: int) -> None:
        self.parts = self.missing = parts
        self.total: Tensor | None = None

    def add(self, place: slice, grad: Tensor, shape: torch.Size) -> Tensor | None:
        """The sum once all parts have been added, and nothing before."""
        total = grad.new_zeros(shape) if self.total is None else self.total
        total[:, :, place] += grad
        self.missing -= 1
        if self.missing:
            self.total = total
            return None
        self.missing, self.total = self.parts, None
        return total


class _Part(torch.autograd.Function):
    """tensor[:, :, place]. Parts overlap, and the gradient of a plain slice is as long as the whole tensor: one for
    each block would make backward quadratic."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, place: slice, grads: _Sum) -> Tensor:
        ctx.place, ctx.grads, ctx.shape = place, grads, tensor.shape
        return tensor[:, :, place]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.grads.add(ctx.place, grad, ctx.shape), None, None
