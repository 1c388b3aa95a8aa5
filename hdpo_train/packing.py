"""Where the tokens of a micro-batch lie, and which of them attend to which.

    pairs ── documents ──> [prompt][chosen][rejected] where that is less work, else [prompt][chosen] [prompt][rejected]
          ── rows ───────> documents end to end; positions restart with each, and at the prompt's end for `rejected`

One number per token, its segment, says who sees whom: document d has segment 3d for what all of it may see (the prompt,
or a whole sequence), 3d + 1 for chosen and 3d + 2 for rejected. A token sees what comes before it in its own segment
and in segment 3d. Sliding windows count positions within the sequence, not places in the row.

An attention kernel that skips what is masked (FlexAttention, FlashAttention's varlen) gets one row and no padding
anywhere. One that computes what is masked (sdpa, eager) pays for a row of R tokens with R² products: there the
documents are dealt to the number of rows that costs least, and only the ends of these rows are padding. Where every row
is one sequence, as with long ones, the batch is a padded one: it needs no mask of R² entries.
"""

import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils import logging

from hdpo_train.models import backbone_of, evaluating

logger = logging.get_logger(__name__)

_PADDING = -3  # its segment: a document of its own, so that no softmax is empty
_ROW_COUNTS_TRIED = 32


class Unpackable(ValueError):
    """The model's attention does not keep packed sequences apart."""


class Places(NamedTuple):
    """What a backbone must know of a packed batch beside its tokens."""

    position_ids: Tensor  # (B, R)
    segment_ids: Tensor  # (B, R)
    document_lengths: list[int]  # tokens; in order, if there is one row


@dataclass(frozen=True)
class Layout:
    """How pairs are laid out; the default is a row for each sequence, padded on the right.

    packed: documents lie end to end. share: whether chosen and rejected share one copy of their prompt.
    width: the model's hidden size if its attention computes what is masked, 0 if it skips that.
    """

    packed: bool = False
    share: Literal["never", "where it pays", "always"] = "never"
    width: int = 0

    def __str__(self) -> str:
        shared = "" if self.share == "never" else f", prompts shared {self.share}"
        return f"packed{shared}" if self.packed else "padded"

    def shares(self, prompt: int, chosen: int, rejected: int) -> bool:
        """Whether a pair of these lengths is one document: by default, where that is less work.

        Outside attention a token takes about 24·H² operations per layer, a product of dense attention 4·H. Sharing
        saves `prompt` tokens, and turns (p + c)² + (p + r)² products into (p + c + r)².
        """
        if self.share == "where it pays":
            return not self.width or prompt * (6 * self.width + prompt) > 2 * chosen * rejected
        return self.share == "always"

    def tokens(self, prompt: int, chosen: int, rejected: int) -> int:
        """Tokens that a pair puts into a batch; in a padded batch, if it is the longest."""
        if not self.packed:
            return 2 * (prompt + max(chosen, rejected))
        return prompt + chosen + rejected + (0 if self.shares(prompt, chosen, rejected) else prompt)

    def rows(self, lengths: list[int]) -> list[list[int]]:
        """The documents of each row."""
        if not self.packed:
            return [[document] for document in range(len(lengths))]
        if not self.width:
            return [list(range(len(lengths)))]
        step = max(1, len(lengths) // _ROW_COUNTS_TRIED)
        dealt = (_deal(lengths, count) for count in range(1, len(lengths) + 1, step))
        return min(dealt, key=lambda rows: self._cost(len(rows), max(sum(lengths[d] for d in row) for row in rows)))

    def _cost(self, rows: int, length: int) -> int:
        """Work of a backbone, in units of 4·H operations per layer."""
        return rows * length * (6 * self.width + length)


PADDED = Layout()


def _deal(lengths: list[int], count: int) -> list[list[int]]:
    """Documents dealt to `count` rows, the longest first, each to the row that is shortest."""
    rows: list[list[int]] = [[] for _ in range(count)]
    shortest = [(0, row) for row in range(count)]
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        length, row = shortest[0]
        rows[row].append(document)
        heapq.heapreplace(shortest, (length + lengths[document], row))
    return rows


def lay_out(pairs: list[tuple[Any, Any, Any]], layout: Layout, pad_token_id: int) -> dict[str, Any]:
    """The batch of P pairs (ids of prompt, chosen, rejected), without reference log-probs; see `data.PairCollator`."""
    documents = [
        document
        for prompt, chosen, rejected in pairs
        for document in (
            [(prompt, chosen, rejected)]
            if layout.shares(len(prompt), len(chosen), len(rejected))
            else [(prompt, chosen), (prompt, rejected)]
        )
    ]
    lengths = [sum(map(len, document)) for document in documents]
    rows = layout.rows(lengths)
    width = max(sum(lengths[document] for document in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id, device="cpu")
    position_ids = torch.zeros_like(input_ids)
    segment_ids = torch.full_like(input_ids, _PADDING)
    predicting: dict[int, list[Tensor]] = {}  # for each document, where its completions are predicted
    for b, row in enumerate(rows):
        begin = 0
        for d in row:
            prompt, *completions = documents[d]
            end, at = begin + lengths[d], begin + len(prompt)
            input_ids[b, begin:end] = torch.tensor(
                [int(token) for part in documents[d] for token in part], device="cpu"
            )
            position_ids[b, begin:at] = torch.arange(len(prompt), device="cpu")
            segment_ids[b, begin:end] = 3 * d
            predicting[d] = []
            for s, completion in enumerate(completions):
                position_ids[b, at : at + len(completion)] = torch.arange(
                    len(prompt), len(prompt) + len(completion), device="cpu"
                )
                if len(completions) > 1:
                    segment_ids[b, at : at + len(completion)] = 3 * d + 1 + s
                places = torch.arange(at - 1, at + len(completion) - 1, device="cpu")
                places[:1] = begin + len(prompt) - 1  # the prompt's last token predicts the first of both
                predicting[d].append(places + b * width)
                at += len(completion)
            begin = end
    completions = [ids for _, chosen, rejected in pairs for ids in (chosen, rejected)]
    batch: dict[str, Any] = {
        "input_ids": input_ids,
        "rows": torch.cat([places for d in range(len(documents)) for places in predicting[d]]),
        "labels": torch.tensor([int(token) for ids in completions for token in ids], device="cpu"),
        "cu_seqlens": [0, *accumulate(map(len, completions))],
        "num_tokens": sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs),
    }
    if len(rows) < len(documents) or any(len(document) > 2 for document in documents):
        lengths = [lengths[d] for row in rows for d in row]
        return {**batch, "position_ids": position_ids, "segment_ids": segment_ids, "document_lengths": lengths}
    return {**batch, "attention_mask": (segment_ids != _PADDING).long()}


def backbone_inputs(model: PreTrainedModel, places: Places) -> dict[str, Any]:
    """Keywords that make the backbone of `model` attend as the places say. Raises Unpackable if there are none."""
    config = model.config.get_text_config()
    attention = config._attn_implementation
    position_ids, segment_ids, document_lengths = places
    if _is_flash(config):
        boundaries = torch.tensor([0, *accumulate(document_lengths)], dtype=torch.int32, device="cpu")
        boundaries = boundaries.to(position_ids.device, non_blocking=True)
        longest = max(document_lengths)
        varlen = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": longest}
        return {"position_ids": position_ids, "attention_mask": None, **varlen, "max_length_k": longest}
    if attention not in ("sdpa", "eager", "flex_attention"):
        raise Unpackable(f"attention implementation {attention!r} takes no mask that is known here (sdpa does)")
    prompts = segment_ids - segment_ids % 3
    make_mask: Any = ALL_MASK_ATTENTION_FUNCTIONS[attention]

    def mask(window: int | None) -> Any:
        def sees(b: Any, head: Any, i: Any, j: Any) -> Any:
            theirs = segment_ids[b, j]
            seen = (j <= i) & ((theirs == segment_ids[b, i]) | (theirs == prompts[b, i]))
            return seen if window is None else seen & (position_ids[b, i] - position_ids[b, j] < window)

        B, R = segment_ids.shape
        return make_mask(
            batch_size=B, q_length=R, kv_length=R, mask_function=sees, allow_is_causal_skip=False,
            dtype=model.dtype, device=segment_ids.device, config=config,
        )  # fmt: skip

    masks = {kind: mask(window) for kind, window in _windows(config).items()}
    # a model that knows one kind of layer takes its mask as it is
    return {"position_ids": position_ids, "attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


def _windows(config: Any) -> dict[str, int | None]:
    """For each kind of layer, how many positions it looks back; None: all."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    windows = {"full_attention": None, "sliding_attention": window}
    if strange := sorted(set(kinds) - set(windows)):
        raise Unpackable(f"it has layers of type {', '.join(strange)}")
    return {kind: windows[kind] for kind in dict.fromkeys(kinds)}


def _is_flash(config: Any) -> bool:
    return "flash" in config._attn_implementation


def find_layout(
    models: list[PreTrainedModel], packing: bool | None = None, shared_prompt: bool | None = None
) -> Layout:
    """The layout to train the first model with, which the others (its reference) run too; None is: where it works.

    Whether an attention keeps packed sequences apart is found by a probe of twenty tokens. If one does not, batches are
    padded, with a warning that says why. Raises ValueError if an option asked for what cannot be.
    """
    if packing is False:
        return PADDED
    layout, name = None, ""
    try:
        for model in models:
            name = type(model).__name__
            layout = layout or _layout(model, shared_prompt)
            _probe(model, layout)
    except Unpackable as error:
        if packing or shared_prompt:
            hint = "leave out packing and shared_prompt, so that its batches are padded"
            raise ValueError(f"{name} cannot run packed batches: {error}; {hint}") from None
        logger.warning(f"{name} gets padded batches, prompts twice: {error}")
        return PADDED
    assert layout is not None
    if layout.share == "never" and shared_prompt is None:
        attention = models[0].config.get_text_config()._attn_implementation
        logger.warning(
            f"{attention} has no mask to share the prompts of chosen and rejected; flex_attention and sdpa do"
        )
    return layout


def _layout(model: PreTrainedModel, shared_prompt: bool | None) -> Layout:
    """What the model's attention implementation allows for."""
    config = model.config.get_text_config()
    if _is_flash(config):
        return Layout(packed=True, share="always" if shared_prompt else "never")
    share: Any = {None: "where it pays", True: "always", False: "never"}[shared_prompt]
    return Layout(
        packed=True, share=share, width=0 if config._attn_implementation == "flex_attention" else config.hidden_size
    )


@torch.no_grad()
def _probe(model: PreTrainedModel, layout: Layout) -> None:
    """Raise Unpackable unless packed pairs get the hidden states of their sequences alone.

    What is measured: how much nearer to them than those of the same row, run as if it were one sequence.
    """
    backbone, config = backbone_of(model), model.config.get_text_config()
    if _is_flash(config) and layout.share != "never":
        raise Unpackable(f"{config._attn_implementation} has no mask to share prompts with (flex_attention, sdpa have)")
    ids = [[token % config.vocab_size for token in range(first, first + 10)] for first in (0, 10)]
    pairs = [(pair[:4], pair[4:7], pair[7:]) for pair in ids]
    share: Any = "always" if layout.share != "never" else "never"
    batch = lay_out(pairs, replace(layout, width=0, share=share), 0)
    device = model.get_output_embeddings().weight.device
    alone = torch.tensor([prompt + completion for prompt, *both in pairs for completion in both], device=device)
    row = batch["input_ids"].to(device)
    places = Places(batch["position_ids"].to(device), batch["segment_ids"].to(device), batch["document_lengths"])

    def hidden(input_ids: Tensor, **inputs: Any) -> Tensor:
        return backbone(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state.float()

    with evaluating(model), _short_window(config):
        try:
            packed = hidden(row, **backbone_inputs(model, places))[0, batch["rows"]]
        except Unpackable:
            raise
        except Exception as error:  # models that take no mask of this kind say so in many ways
            raise Unpackable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}") from error
        truth, mixed = hidden(alone)[:, 3:6].flatten(0, 1), hidden(row)[0, batch["rows"]]
    difference, scale = (packed - truth).norm(), (mixed - truth).norm()
    rounding = 5e-3 if model.dtype == torch.float32 else 5e-2  # measured: 1e-6 and 1e-2
    if difference > rounding * scale + 1e-5 * truth.norm():
        raise Unpackable(
            f"its sequences see each other ({difference / scale:.0%} of what they would without boundaries)"
        )


@contextmanager
def _short_window(config: Any) -> Iterator[None]:
    """A sliding window that matters within a few tokens."""
    window = getattr(config, "sliding_window", None)
    try:
        if window:
            config.sliding_window = 3
        yield
    finally:
        if window:
            config.sliding_window = window
