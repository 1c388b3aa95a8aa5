"""Layers in tiles: the same steps, in less memory where sequences are long.

    checkpointed layers   one sequence after the other: what lives inside a layer is that of one
    MLPs, norms           one tile of tokens after the other, and again in backward

Exact but for the order of sums: a layer keeps sequences apart, MLPs and norms keep tokens apart. A prompt that is
shared goes through a layer with the chosen completion, and, where the two completions are long beside it, once more
with the rejected one, whose part is kept. Sequences that are short go together.
"""

import functools
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

from hdpo_train.model.attention import Documents
from hdpo_train.model.head import head_of
from hdpo_train.model.loading import backbone_of, evaluating
from hdpo_train.model.packing import VARLEN, varlen

logger = logging.get_logger(__name__)
TILE = 4096  # tokens: enough for a GEMM to run at full speed
_NORM = re.compile("LayerNorm|RMSNorm")  # in the names of classes
_PLAIN = (type(None), bool, int, float, str, torch.dtype)  # arguments of a layer that are the same for all tokens


def tile_tokens(model: PreTrainedModel, refuse: bool = True) -> str:
    """Let every layer's `mlp`, and every norm, run on tiles of tokens; `model` is the bare transformers model.

    refuse: raise ValueError, naming the model, where no layer has an `mlp`, or one gives something else than a vector a
        token. Otherwise such MLPs stay as they are, and the reason is returned; else "".
    """
    mlps = [module for name, module in backbone_of(model).named_modules() if name.rpartition(".")[2] == "mlp"]
    outputs: list[Any] = []
    hooks = [mlp.register_forward_hook(lambda module, inputs, output: outputs.append(output)) for mlp in mlps]
    with torch.no_grad(), evaluating(model):
        backbone_of(model)(input_ids=torch.arange(2, device=head_of(model).weight.device)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    reason = ""
    if not mlps or not all(isinstance(output, Tensor) and output.dim() == 3 for output in outputs):
        what = "give more than a vector for each token" if mlps else "are not called mlp"
        reason, mlps = f"the MLPs of {type(model).__name__} {what}", []
    if reason and refuse:
        raise ValueError(f"tiled_layers cannot be used: {reason}; leave it out")
    norms = [module for module in backbone_of(model).modules() if _NORM.search(type(module).__name__)]
    for module in (*mlps, *norms):
        module.forward = types.MethodType(_InTiles.forward, module)  # type: ignore[method-assign]
    return reason


# Bound to a module as its forward; it knows the module as `self` alone, so that a copy runs with its own weights.
class _InTiles(nn.Module):
    def forward(self, hidden: Tensor, *others: Any, **kwargs: Any) -> Tensor:
        own, shape = type(self).forward, hidden.shape[:-1]
        dim = max(range(len(shape)), key=shape.__getitem__)  # that of tokens, if there are so many
        if shape[dim] <= TILE:
            return own(self, hidden, *others, **kwargs)

        def tiles(value: Any) -> Sequence[Any]:
            if isinstance(value, Tensor) and value.shape[:-1] == shape:
                return value.split(TILE, dim)
            return [value] * -(-shape[dim] // TILE)

        outputs = []
        for tile in zip(*map(tiles, (hidden, *others)), strict=True):
            if torch.is_grad_enabled():
                outputs.append(checkpoint(own, self, *tile, use_reentrant=False, **kwargs))
            else:
                outputs.append(own(self, *tile, **kwargs))
        return torch.cat(outputs, dim)


def tile_sequences(model: nn.Module) -> None:
    """Let layers whose activations are checkpointed run on one sequence after the other.

    To be called after checkpointing has been enabled, which undoes it; a second call changes nothing.
    """
    for module in model.modules():
        own = getattr(module, "_gradient_checkpointing_func", None)
        if own is not None and not isinstance(own, _BySequences):
            module._gradient_checkpointing_func = _BySequences(own)  # type: ignore[assignment]


class _Whole(Exception):
    """An input or output of a layer cannot be divided by sequences."""


@dataclass
class _Piece:
    """What a layer runs on at a time: segments of a packed row, or rows of a padded batch."""

    segments: list[int]  # by number
    documents: list[tuple[int, ...]]  # of a packed row, as in `Documents`
    repeated: int = 0  # tokens of a prompt at its beginning, whose outputs another piece gives


class _BySequences:
    """Replaces a layer's checkpoint function: it makes a checkpoint for each piece."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own
        self.whole = False

    @torch.compiler.disable  # lengths differ with every batch, and would be constants of a compiled graph
    def __call__(self, layer: Callable[..., Any], *args: Any) -> Any:
        if not self.whole:
            try:
                return self._by_sequences(layer, args)
            except _Whole as reason:
                self.whole = True
                logger.warning_once(f"Checkpointed layers run on all sequences of a micro-batch at once: {reason}")
        return self.own(layer, *args)

    def _by_sequences(self, layer: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        keywords: dict[str, Any] = getattr(layer, "keywords", {})  # transformers gives a functools.partial
        shape, documents = _row(args, keywords)
        dim = 1 if documents else 0
        sizes, pieces = _divide(*shape, documents)
        if len(pieces) < 2:
            return self.own(layer, *args)
        split = [_split(value, shape[: dim + 1], sizes) for value in args]
        named = {k: _split(value, shape[: dim + 1], sizes) for k, value in keywords.items() if k not in VARLEN}
        # a parameter's gradient must become ready once (DDP and ZeRO wait for it), not once for every piece
        options = {"use_reentrant": False} if getattr(self.own, "keywords", {}).get("use_reentrant") else {}
        outputs = []
        for piece in pieces:
            others = {name: _of(piece, parts) for name, parts in named.items()}
            if VARLEN[0] in keywords:
                boundaries = varlen(piece.documents, keywords[VARLEN[0]].device)
                others |= {name: [value] for name, value in boundaries.items()}
            parts = [part for each in split for part in _of(piece, each)]
            outputs.append(self.own(functools.partial(_run, layer, piece, others), *parts, **options))
        lengths = [sum(sizes[i] for i in piece.segments) - piece.repeated for piece in pieces]
        return _concatenate(outputs, lengths, dim)


def _row(args: Sequence[Any], keywords: dict[str, Any]) -> tuple[tuple[int, int], list[tuple[int, ...]]]:
    """Rows and tokens of a layer's hidden states, and the documents if they are a packed row."""
    values = [*args, *keywords.values()]
    hidden = next((value for value in values if isinstance(value, Tensor)), None)
    mask = next((value for value in values if isinstance(value, BlockMask)), None)
    if hidden is None or not (mask is None or isinstance(mask, Documents)):
        raise _Whole("FlexAttention has one mask for all of them" if mask else "a layer gets no hidden states")
    documents = mask.lengths if mask else getattr(keywords.get(VARLEN[0]), "documents", [])
    return (hidden.shape[0], hidden.shape[1]), documents


def _divide(rows: int, tokens: int, documents: list[tuple[int, ...]]) -> tuple[list[int], list[_Piece]]:
    """Tokens of each segment of a packed row, or rows of each group of them; and the pieces."""
    if not documents:
        together = max(TILE // tokens, 1)
        sizes = [min(together, rows - start) for start in range(0, rows, together)]
        return sizes, [_Piece([number], []) for number in range(len(sizes))]
    sizes, room = [], 0
    pieces: list[_Piece] = []
    for document in documents:
        length = sum(document)
        if length <= room:
            sizes[-1] += length
            pieces[-1].documents.append(document)
            room -= length
        elif len(document) == 3 and length > TILE and document[0] <= min(document[1:]):
            prompt, chosen, rejected = document
            number, room = len(sizes), 0
            sizes += document
            pieces.append(_Piece([number, number + 1], [(prompt + chosen,)]))
            pieces.append(_Piece([number, number + 2], [(prompt + rejected,)], repeated=prompt))
        else:
            pieces.append(_Piece([len(sizes)], [document]))
            sizes.append(length)
            room = TILE - length
    return sizes, pieces


def _split(value: Any, shape: tuple[int, ...], sizes: list[int]) -> list[Any]:
    """The parts of an argument that belong to each segment, or to each group of rows."""
    if isinstance(value, tuple) and value:
        return list(zip(*(_split(each, shape, sizes) for each in value), strict=True))
    if isinstance(value, Tensor) and value.shape[: len(shape)] == shape:
        return list(value.split(sizes, len(shape) - 1))
    of_all = isinstance(value, Tensor) and len(shape) == 1  # rows
    if not (of_all or value == () or isinstance(value, (Documents, *_PLAIN))):
        what = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise _Whole(f"a {what} that they get cannot be divided")
    return [value] * len(sizes)


def _of(piece: _Piece, parts: list[Any]) -> list[Any]:
    own = [parts[number] for number in piece.segments]
    return [Documents(piece.documents, part.window) if isinstance(part, Documents) else part for part in own]


def _run(layer: Callable[..., Any], piece: _Piece, keywords: dict[str, list[Any]], *parts: Any) -> Any:
    count = len(piece.segments)
    args = [_join(parts[i : i + count]) for i in range(0, len(parts), count)]
    output = layer(*args, **{name: _join(each) for name, each in keywords.items()})

    def kept(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(kept, value))
        return value[:, piece.repeated :] if isinstance(value, Tensor) else value

    return kept(output) if piece.repeated else output


def _join(parts: Sequence[Any]) -> Any:
    if len(parts) > 1 and isinstance(parts[0], tuple):
        return tuple(_join(each) for each in zip(*parts, strict=True))
    return torch.cat(list(parts), 1) if len(parts) > 1 and isinstance(parts[0], Tensor) else parts[0]


def _concatenate(outputs: Sequence[Any], lengths: list[int], dim: int) -> Any:
    """lengths: of the pieces' outputs along dim."""
    if all(isinstance(output, tuple) for output in outputs):
        return tuple(_concatenate(each, lengths, dim) for each in zip(*outputs, strict=True))
    if all(output is None for output in outputs):
        return None
    for output, length in zip(outputs, lengths, strict=True):
        if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[dim] != length:
            raise _Whole("what they give is more than a vector for each token")
    return torch.cat(list(outputs), dim)
