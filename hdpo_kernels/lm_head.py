"""A piece of rows through the LM head: logits → `TokenLogp`, gradient rows; and the head's weight gradient.

The gradient rows are *unscaled*, g_t = ∂logp_t/∂logits_t = (onehot − p) · chain. A loss that is a function of
log-probabilities scales row t by one number c_t, which may be known long after the logits are gone, and is applied on
the thin side of each GEMM:

    d_hidden_t = c_t · (g_t W)            d_weight = Σ_t g_tᵀ (c_t h_t)            d_bias = Σ_t c_t g_t
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import deterministic

from hdpo_kernels.checks import check_label_values
from hdpo_kernels.chunks import accelerator_bytes, rows_for
from hdpo_kernels.device import ACCELERATORS, to_device
from hdpo_kernels.gemm import addmm_into, mm_into
from hdpo_kernels.naive import IGNORE_INDEX, TokenLogp
from hdpo_kernels.parallel import VocabShard
from hdpo_kernels.rows import backend
from hdpo_kernels.rows.torch import BLOCK_BYTES
from hdpo_kernels.sampled.entries import Sampling

# Writing and reading fp32 logits costs as long as the GEMM itself at H of about 700 on an H200, and less as H grows,
# by traffic alone (README.md); no forward row of benchmarks/results/cuda.csv has confirmed the limit yet.
FUSED_MAX_HIDDEN = 1024


@dataclass(frozen=True)
class HeadOptions:
    softcap: float | None = None
    logit_scale: float = 1.0
    chunk_bytes: int | None = None

    @property
    def arguments(self) -> tuple[float | None, float, int | None]:
        """Its fields, as operators take them."""
        return self.softcap, self.logit_scale, self.chunk_bytes

    def __post_init__(self) -> None:
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ValueError(f"softcap must be a positive number or None, got {self.softcap}")
        if not 0 < abs(self.logit_scale) < float("inf"):
            raise ValueError(f"logit_scale must be a finite number other than zero, got {self.logit_scale}")
        if self.chunk_bytes is not None and not (isinstance(self.chunk_bytes, int) and self.chunk_bytes > 0):
            raise ValueError(f"chunk_bytes must be a positive int, or None for the default, got {self.chunk_bytes}")


class ScoredRows:
    """Which of N rows go through the head: those with a label, where labels on the CPU tell, otherwise all."""

    def __init__(self, labels: Tensor, vocab: int, device: torch.device, cu_seqlens: Tensor | None = None) -> None:
        """cu_seqlens: boundaries in N, already checked, of sequences that the rows make up."""
        self.all_scored = check_label_values(labels, vocab)  # and known to be
        self.num_rows, self._keep, on_device = labels.shape[0], None, [labels.contiguous()]
        if not self.all_scored and (keep := _scored(labels)) is not None:
            self.all_scored, self._keep, on_device = True, keep, [labels.index_select(0, keep), keep]
        if cu_seqlens is not None:
            if self._keep is not None:
                cu_seqlens = torch.searchsorted(self._keep, cu_seqlens.to("cpu", torch.int64))
            self.bounds: list[int] = cu_seqlens.tolist()  # boundaries in the rows that go through the head
            on_device.append(cu_seqlens.contiguous())
        self.labels, *rest = to_device(on_device, device)
        self._index = None if self._keep is None else rest[0]
        self.cu_seqlens = None if cu_seqlens is None else rest[-1]

    def select(self, rows: Tensor) -> Tensor:
        """(N, …) -> (scored, …)"""
        index = self._keep if rows.device.type == "cpu" else self._index
        return rows if index is None else rows.index_select(0, index)

    def spread(self, rows: Tensor) -> Tensor:
        """(scored, …) -> (N, …), zero elsewhere"""
        if self._index is None:
            return rows
        return rows.new_zeros(self.num_rows, *rows.shape[1:]).index_copy_(0, self._index, rows)


def _scored(labels: Tensor) -> Tensor | None:
    """Indices of the rows with a label, or None where finding out would cost a device sync."""
    return None if labels.device.type != "cpu" else (labels != IGNORE_INDEX).nonzero().squeeze(1)


class LMHead:
    """hidden (N, H) and weight (V, H), cast to one dtype, with the buffers that its pieces share.

    On a CPU the heads of one thread share them too: a new one ends the use of the last.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: ScoredRows,
        options: HeadOptions,
        dtype: torch.dtype,
        with_grad: bool,
        sampling: Sampling | None = None,
        shard: VocabShard | None = None,  # of the vocabulary, if other ranks have more of it
    ) -> None:
        self.hidden, self.weight = rows.select(hidden).to(dtype), weight.to(dtype)
        self.labels, self.all_scored = rows.labels, rows.all_scored
        if shard is not None and shard.cut:
            self.labels = shard.own_labels(self.labels)
        self.bias = None if bias is None else bias.to(dtype).contiguous()
        self.options, self.with_grad, self.sampling = options, with_grad, sampling
        num_rows, vocab = self.hidden.shape[0], weight.shape[0]
        self.dtype = full_precision(dtype)
        self.stats = torch.empty(3, num_rows, dtype=self.dtype, device=hidden.device)  # `TokenLogp` of each row
        self._merge = shard.merge if shard is not None and shard.cut else None
        self._fused = None if with_grad or sampling or self._merge else fused_forward(self.hidden, self.weight)
        largest = vocab if shard is None else shard.largest  # ranks must cut rows alike
        self.piece_rows, self.tile_rows, tables = buffers_for(
            num_rows, largest, dtype, with_grad, options.chunk_bytes, hidden.device
        )
        if self._fused:
            self.piece_rows, self.tile_rows, tables = max(num_rows, 1), max(num_rows, 1), [(0, self.dtype)]
        self._logits, *grad = _buffers(hidden.device, vocab, *tables)
        self._grad = grad[0] if grad else self._logits

    def pieces(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.hidden.shape[0], self.piece_rows):
            yield start, min(start + self.piece_rows, self.hidden.shape[0])

    def score(self, start: int, end: int) -> Tensor:
        """Fill stats (and the sampling's entries) of rows start … end; return their gradient rows, if wanted, valid
        until the next call.
        """
        for first in range(start, end, self.tile_rows):
            rows = slice(first, min(first + self.tile_rows, end))
            grad_out: Tensor | Sampling | None = None
            if self.with_grad:
                grad_out = self._grad[first - start : rows.stop - start]
            elif self.sampling is not None:
                grad_out = self.sampling.rows(rows)
            self._score_tile(rows, grad_out)
        return self._grad[: end - start]

    def _score_tile(self, rows: slice, grad_out: Tensor | Sampling | None) -> None:
        hidden, labels, out = self.hidden[rows], self.labels[rows], TokenLogp(*self.stats[:, rows].unbind(0))
        head = {"bias": self.bias, "softcap": self.options.softcap, "logit_scale": self.options.logit_scale, "out": out}
        if self._fused:
            self._fused(hidden, self.weight, labels, **head)
            return
        logits = self._logits[: len(hidden)]
        mm_into(logits, hidden, self.weight.T)
        known = {"merge": self._merge} if self._merge else {"all_scored": self.all_scored}
        backend(logits).row_stats(logits, labels, grad_out=grad_out, **known, **head)

    def thin(self, start: int, end: int, scale: Tensor, factor: float) -> Tensor:
        """factor · scale_t h_t for rows start … end, rows that are not scored zero whatever they hold."""
        labels = None if self.all_scored else self.labels[start:end]
        hidden = self.hidden[start:end]
        return backend(self.stats).scale_rows(hidden, scale, factor=factor, labels=labels)


def fused_forward(hidden: Tensor, weight: Tensor) -> Callable[..., TokenLogp] | None:
    """`fused.linear_stats` where it is the faster way to statistics of rows without gradients, otherwise None."""
    if hidden.device.type != "cuda" or hidden.element_size() != 2 or hidden.shape[1] > FUSED_MAX_HIDDEN:
        return None
    if any(size % 16 for size in (hidden.shape[1], hidden.stride(0), weight.stride(0))):
        return None  # tiles of rows that are not aligned are not loaded ahead
    from hdpo_kernels.fused import linear_stats

    return linear_stats


def buffers_for(
    num_rows: int, vocab: int, dtype: torch.dtype, with_grad: bool, chunk_bytes: int | None, device: torch.device
) -> tuple[int, int, list[tuple[int, torch.dtype]]]:
    """Rows of a piece, of a tile of logits, and (rows, dtype) of each buffer of V numbers a row."""
    full, chunk_bytes = full_precision(dtype), chunk_bytes or _default_chunk_bytes(device, vocab)
    grad_bytes = dtype.itemsize if with_grad else None
    piece_rows, tile_rows = rows_for(chunk_bytes, pitch(vocab, device), full.itemsize, grad_bytes)
    tables = [(min(tile_rows, num_rows), full)]
    if with_grad and dtype != full:
        tables.append((min(piece_rows, num_rows), dtype))
    return piece_rows, tile_rows, tables


class WeightGrad:
    """d_weight (V, H) and d_bias (V,), those that are wanted, accumulated in full precision over pieces."""

    def __init__(self, head: LMHead, need_weight: bool, need_bias: bool) -> None:
        wanted = (head.weight if need_weight else None, head.bias if need_bias else None)
        self.sums = [None if w is None else w.new_empty(w.shape, dtype=head.dtype) for w in wanted]
        self.empty = True

    @property
    def wanted(self) -> bool:
        return any(acc is not None for acc in self.sums)

    def add(self, head: LMHead, grad: Tensor, start: int, end: int, scale: Tensor, unit: float = 1.0) -> None:
        """+= Σ_t scale_t g_tᵀ h_t over rows start … end, `grad` being their gradient rows.

        unit: scale is multiplied by it while it is in the inputs' dtype (fp16 ends at 6e-8), and the sum divided by it.
        """
        beta = 0.0 if self.empty else 1.0
        d_weight, d_bias = self.sums
        if d_weight is not None:
            addmm_into(d_weight, grad.T, head.thin(start, end, scale, unit), alpha=1 / unit, beta=beta)
        if d_bias is not None:
            column = (scale * unit).unsqueeze(1).to(grad.dtype)
            addmm_into(d_bias.unsqueeze(1), grad.T, column, alpha=1 / unit, beta=beta)
        self.empty = False

    def fold(self, other: "WeightGrad", factor: Tensor) -> None:
        """+= factor · other, factor a scalar on the device."""
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            if mine is not None and theirs is not None:
                torch.mul(theirs, factor, out=mine) if self.empty else mine.addcmul_(theirs, factor)
        self.empty = False

    def scale(self, factor: Tensor) -> None:
        for acc in self.sums:
            if acc is not None:
                acc.mul_(factor)

    def total(self) -> list[Tensor | None]:
        """[d_weight, d_bias], those that are wanted."""
        if self.empty:
            self.sums = [None if acc is None else acc.zero_() for acc in self.sums]
        return self.sums


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is accumulated in."""
    return torch.promote_types(dtype, torch.float32)


_kept = threading.local()


def _buffers(device: torch.device, vocab: int, *tables: tuple[int, torch.dtype]) -> list[Tensor]:
    """Uninitialised (rows, vocab) for each (rows, dtype), on a CPU in memory that this thread keeps for its next call.

    A CPU's system zeroes pages at their first touch and takes large blocks back when they are freed: together up to a
    third of the GEMM that writes the logits. CUDA's allocator keeps its blocks by itself.
    """
    step = pitch(vocab, device)
    sizes = [-(-rows * step * dtype.itemsize // 512) * 512 for rows, dtype in tables]  # rows aligned as GEMMs like it
    memory = getattr(_kept, "memory", None) if device.type == "cpu" else None
    if memory is None or memory.numel() < sum(sizes):
        memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        if device.type == "cpu":
            _kept.memory = memory
    elif torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        memory.fill_(255)  # NaN in every floating dtype, as in fresh memory then
    starts = [0, *itertools.accumulate(sizes)]
    return [
        memory.view(dtype).as_strided((rows, vocab), (step, 1), start // dtype.itemsize)
        for start, (rows, dtype) in zip(starts, tables, strict=False)
    ]


def pitch(vocab: int, device: torch.device) -> int:
    """Numbers from one row of a buffer to the next. Rows of an odd vocabulary, aligned to 2 bytes, would halve cuBLAS'
    speed.
    """
    return -(-vocab // 64) * 64 if device.type in ACCELERATORS else vocab


def _default_chunk_bytes(device: torch.device, vocab: int) -> int:
    # CPU: 512 rows fill a GEMM, and a pass over d_weight is then some 5% of the piece's GEMMs. Accelerators want
    # thousands of rows for the same reason (d_weight's traffic), and have the memory. Where the vocabulary is small, a
    # call is bound by the host, and pieces are as large as the cache that rows are walked in.
    return max(512 * 4 * vocab, BLOCK_BYTES) if device.type == "cpu" else accelerator_bytes(vocab)
