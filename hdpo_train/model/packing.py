"""Where the tokens of a micro-batch lie, and which of them attend to which.

    pairs ── documents ──> [prompt|chosen|rejected] where prompts are shared, else [prompt chosen] [prompt rejected]
          ── packed ─────> documents end to end in one row; positions restart with each, and at the prompt's end for
                           `rejected`. A token sees its own sequence up to itself, and nothing else.
          ── padded ─────> a row for each sequence, padded on the right, where no token sees the padding

Neither needs a mask of R × R entries: sdpa and eager attend by documents (see `attention`), FlashAttention by its
varlen interface, FlexAttention by a block mask. Sliding windows count positions within the sequence, not in the row.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import flex_attention_mask
from transformers.utils import logging

from hdpo_kernels.device import to_device
from hdpo_train.model.attention import Documents, attend_by_documents, attends_by_documents, can_attend_by_documents
from hdpo_train.model.loading import backbone_of, evaluating, max_positions

logger = logging.get_logger(__name__)
_TWENTY_TOKENS = [(4, 3, 3), (4, 3, 3)]  # of the probe: prompt, chosen and rejected of two pairs
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_WINDOW = re.compile("window|local|chunk")  # in the names of options for attention that does not look back all the way


class Unpackable(ValueError):
    """The model's attention does not keep packed sequences apart."""


class OnHost:
    """A tensor that frameworks leave on the host, and pin there: they move what is a tensor, or has a method `to`."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def pin_memory(self) -> "OnHost":  # called by the data loader
        return OnHost(self.tensor.pin_memory())


class Places(NamedTuple):
    """What a backbone must know of a packed row beside its tokens."""

    position_ids: Tensor  # (1, R)
    documents: list[tuple[int, ...]]  # tokens of (sequence,) or of (prompt, chosen, rejected), in order
    ranks: Any = None  # a SequenceRanks if position_ids are of this process's part of the row


@dataclass(frozen=True)
class Layout:
    """How pairs are laid out; the default is a row for each sequence, padded on the right.

    packed: documents lie end to end. share: chosen and rejected share one copy of their prompt.
    """

    packed: bool = False
    share: bool = False

    def __str__(self) -> str:
        return f"packed{', prompts shared' * self.share}" if self.packed else "padded"

    def tokens(self, prompt: int, chosen: int, rejected: int) -> int:
        """Tokens that a pair puts into a batch; in a padded batch, if it is the longest."""
        if not self.packed:
            return 2 * (prompt + max(chosen, rejected))
        return prompt + chosen + rejected + (0 if self.share else prompt)


PADDED = Layout()


def lay_out(pairs: list[tuple[Any, Any, Any]], layout: Layout, pad_token_id: int) -> dict[str, Any]:
    """The batch of P pairs (ids of prompt, chosen, rejected), without reference log-probs; see `data.PairCollator`."""
    documents = [
        document
        for prompt, chosen, rejected in pairs
        for document in ([(prompt, chosen, rejected)] if layout.share else [(prompt, chosen), (prompt, rejected)])
    ]
    lengths = [sum(map(len, document)) for document in documents]
    width = max(lengths)  # of a padded row
    starts = [0, *accumulate(lengths)] if layout.packed else list(range(0, (len(lengths) + 1) * width, width))
    input_ids = torch.full((starts.pop(),), pad_token_id, device="cpu")
    counts = torch.zeros_like(input_ids)
    positions, rows = [], []
    for (prompt, *completions), start, length in zip(documents, starts, lengths, strict=True):
        at = start + len(prompt)
        tokens = [int(token) for part in (prompt, *completions) for token in part]
        input_ids[start : start + length] = torch.tensor(tokens, device="cpu")
        counts[start : start + length] = 1
        counts[start : start + len(prompt)] = len(completions)
        positions.append(torch.arange(len(prompt), device="cpu"))
        for completion in completions:
            positions.append(torch.arange(len(prompt), len(prompt) + len(completion), device="cpu"))
            predicting = torch.arange(at - 1, at + len(completion) - 1, device="cpu")
            predicting[:1] = start + len(prompt) - 1  # the prompt's last token predicts the first of both
            rows.append(predicting)
            at += len(completion)
    completions = [ids for _, chosen, rejected in pairs for ids in (chosen, rejected)]
    batch: dict[str, Any] = {
        "input_ids": input_ids.view(1 if layout.packed else len(documents), -1),
        "counts": counts.view(1 if layout.packed else len(documents), -1),
        "rows": torch.cat(rows),
        "labels": OnHost(torch.tensor([int(token) for ids in completions for token in ids], device="cpu")),
        "cu_seqlens": [0, *accumulate(map(len, completions))],
        "num_tokens": sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs),
    }
    if layout.packed:
        batch["position_ids"] = torch.cat(positions).unsqueeze(0)
        batch["documents"] = [tuple(map(len, d)) if layout.share else (sum(map(len, d)),) for d in documents]
    return batch


def backbone_inputs(model: PreTrainedModel, places: Places) -> dict[str, Any]:
    """Keywords that make the backbone of `model` attend as the places say. Raises Unpackable if there are none."""
    config = model.config.get_text_config()
    position_ids, documents, ranks = places
    if _is_flash(config):
        return {"position_ids": position_ids, "attention_mask": None, **varlen(documents, position_ids.device)}
    if attends_by_documents(config):
        masks: dict[str, Any] = {kind: Documents(documents, window, ranks) for kind, window in _windows(config).items()}
    elif config._attn_implementation == "flex_attention":
        masks = {kind: _flex_mask(places, window) for kind, window in _windows(config).items()}
    else:
        raise Unpackable(f"attention implementation {config._attn_implementation!r} is not known here (sdpa is)")
    # a model that knows one kind of layer takes its mask as it is
    return {"position_ids": position_ids, "attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


def varlen(documents: list[tuple[int, ...]], device: torch.device) -> dict[str, Any]:
    """Keywords of FlashAttention's varlen interface; the boundaries have the documents with them, on the host."""
    lengths = [length for (length,) in documents]
    (boundaries,) = to_device([torch.tensor([0, *accumulate(lengths)], device="cpu")], device)
    boundaries = boundaries.int()
    boundaries.documents = documents  # type: ignore[attr-defined]
    longest = max(lengths)
    return dict(zip(VARLEN, (boundaries, boundaries, longest, longest), strict=True))


def _flex_mask(places: Places, window: int | None) -> Any:
    """Document d has segment 3d for its prompt or its one sequence, 3d + 1 for chosen and 3d + 2 for rejected."""
    position_ids, documents = places.position_ids[0], places.documents
    parts = [(3 * d + part, length) for d, lengths in enumerate(documents) for part, length in enumerate(lengths)]
    columns = [torch.tensor(column, device="cpu") for column in zip(*parts, strict=True)]
    numbers, lengths = to_device(columns, position_ids.device)
    segments = torch.repeat_interleave(numbers, lengths, output_size=len(position_ids))
    prompts = segments - segments % 3

    def sees(b: Any, head: Any, i: Any, j: Any) -> Any:
        theirs = segments[j]
        seen = (j <= i) & ((theirs == segments[i]) | (theirs == prompts[i]))
        return seen if window is None else seen & (position_ids[i] - position_ids[j] < window)

    size = len(position_ids)
    return flex_attention_mask(
        batch_size=1, q_length=size, kv_length=size, mask_function=sees, device=position_ids.device
    )


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


def use_layout(model: PreTrainedModel, layout: Layout) -> None:
    """Let the attention of a model run batches of this layout; it runs others as before."""
    config = model.config.get_text_config()
    attend_by_documents(config, layout.packed and can_attend_by_documents(config))


def find_layout(
    models: list[PreTrainedModel], packing: bool | None = None, shared_prompt: bool | None = None, longest: int = 0
) -> Layout:
    """The layout for the first model, which the others (its reference) must run too. None: wherever it works.

    Whether an attention keeps packed sequences apart is found by a probe of twenty tokens. If one does not, batches are
    padded, with a warning that says why.

    longest: tokens of the longest sequence; windows of attention that are shorter are probed in their own length too.

    Raises ValueError if an option asked for what cannot be.
    """
    layout, name = PADDED, ""
    if packing is not False:
        shares = not any(_is_flash(model.config.get_text_config()) for model in models)
        layout = Layout(packed=True, share=shares if shared_prompt is None else shared_prompt)
    try:
        for model in models:
            name = type(model).__name__
            use_layout(model, layout)
            if layout.packed:
                _probe(model, layout, _TWENTY_TOKENS, _short_windows)
                for window in sorted(set(_windows_by_name(model).values())):
                    if window < longest:
                        # rejected lies a window behind its prompt: one that counts places would not reach it
                        room = min(window, (max_positions(model.config) or 2 * window) - window)
                        _probe(model, layout, [(window, room, min(room, 3))])
    except Unpackable as error:
        for model in models:
            use_layout(model, PADDED)
        if packing or shared_prompt:
            hint = "leave out packing and shared_prompt, so that its batches are padded"
            raise ValueError(f"{name} cannot run packed batches: {error}; {hint}") from None
        logger.warning(f"{name} gets padded batches, prompts twice: {error}")
        return PADDED
    if layout.packed and not layout.share and shared_prompt is None:
        logger.warning(
            "FlashAttention has no mask to share the prompts of chosen and rejected; sdpa and flex_attention do"
        )
    return layout


@torch.no_grad()
def _probe(
    model: PreTrainedModel,
    layout: Layout,
    lengths: list[tuple[int, int, int]],
    windows: Callable[[PreTrainedModel], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Raise Unpackable unless packed pairs get the hidden states of their sequences alone.

    What is measured: how much nearer to them than those of the same row, run as if it were one sequence.
    lengths: of prompt, chosen and rejected of each pair. windows: how the model's windows are during the probe.
    """
    backbone, config = backbone_of(model), model.config.get_text_config()
    if _is_flash(config) and layout.share:
        raise Unpackable(f"{config._attn_implementation} has no mask to share prompts with (sdpa, flex_attention have)")
    ids = (token % config.vocab_size for token in count())
    pairs: list[Any] = [tuple(list(islice(ids, length)) for length in pair) for pair in lengths]
    batch = lay_out(pairs, layout, 0)
    device = model.get_output_embeddings().weight.device
    alone = [(prompt, completion) for prompt, *both in pairs for completion in both]
    row, places = batch["input_ids"].to(device), Places(batch["position_ids"].to(device), batch["documents"])

    def hidden(input_ids: Tensor, **inputs: Any) -> Tensor:
        return backbone(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state.float()

    with evaluating(model), windows(model):
        try:
            packed = hidden(row, **backbone_inputs(model, places))[0, batch["rows"]]
            mixed = hidden(row)[0, batch["rows"]]
        except Unpackable:
            raise
        except Exception as error:  # models that take no mask of this kind say so in many ways
            raise Unpackable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}") from error
        truth = torch.cat(
            [
                hidden(torch.tensor([prompt + completion], device=device))[0, len(prompt) - 1 : -1]
                for prompt, completion in alone
            ]
        )
    difference, scale = (packed - truth).norm(), (mixed - truth).norm()
    rounding = 5e-3 if model.dtype == torch.float32 else 5e-2  # measured: 1e-6 and 1e-2
    if difference > rounding * scale + 1e-5 * truth.norm():
        raise Unpackable(
            f"its sequences see each other ({difference / scale:.0%} of what they would without boundaries)"
        )


def _windows_by_name(model: PreTrainedModel) -> dict[str, int]:
    """Config options whose names suggest windows of attention; some may be something else."""
    values = vars(model.config.get_text_config())
    return {name: value for name, value in values.items() if type(value) is int and value > 3 and _WINDOW.search(name)}


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Windows that matter within a few tokens, if the model reads them from its config when it runs."""
    config, windows = model.config.get_text_config(), _windows_by_name(model)
    try:
        for name in windows:
            setattr(config, name, 3)
        yield
    finally:
        for name, value in windows.items():
            setattr(config, name, value)
