"""Products of sampled rows with matrices as Triton kernels: weighted sums of table rows, accumulated in fp32.

    gather              one program a row and block of columns sums the rows of the weight that its entries name
    gather_transposed   entries sorted by vocabulary, stable by row (a counting sort), then the same for each v

n rows of at most B entries, V vocabulary, H hidden size, G groups of consecutive rows. Every output element is summed
by one program in a fixed order, and atomics are on integers only, where their order cannot be seen: the same input
gives the same bits. Sizes come from shapes, never from the device: no launch waits for another. Offsets are int64
before any product with a stride.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdpo_kernels.sampled.entries import Entries

# Tiles by plain constants, 16 KiB of a table under way in a program of 4 warps: of bf16 that takes 64 fp32 accumulators
# a thread; as many of an fp32 table did not fit the registers of sm_100. 512 columns are 1 KiB of a bf16 row, and of a
# table as much as an L2 cache holds of 50,000 rows.
TILE_BYTES = 2**14
MOST_COLUMNS = 512
NUM_WARPS = 4
# A frequent token is in most rows: v with more entries are left to programs of fewer columns and more rows at a time
LONG = 256
LONG_COLUMNS = 128
LONG_PROGRAMS = 64  # for each block of columns; each takes every 64th long v, longest first
# The sort walks the rows of a group one after the other and keeps a (G, V) table of int32
MOST_GROUPS = 128
LEAST_ROWS = 64  # of a group
BLOCK_B = 256
MOST_INT32 = 2**31 - 1


@triton.jit
def _weighted_sum(
    indices_ptr,
    values_ptr,
    length,
    scale,
    table_ptr,
    table_stride,
    offs_h,
    mask_h,
    BLOCK_J: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Σ_j scale · values_j · table[indices_j], columns offs_h; sums per lane, no reduction over threads in the loop."""
    acc = tl.zeros([BLOCK_J, BLOCK_H], tl.float32)
    for start in range(0, length, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < length
        index = tl.load(indices_ptr + offs_j, mask=mask_j, other=0).to(tl.int64)
        value = tl.load(values_ptr + offs_j, mask=mask_j, other=0.0) * scale
        value = tl.where(mask_j, value, 0.0)  # 0 · inf
        table = table_ptr + index[:, None] * table_stride + offs_h[None, :]
        acc += value[:, None] * tl.load(table, mask=mask_j[:, None] & mask_h[None, :], other=0.0).to(tl.float32)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["B"])
def _gather_kernel(
    columns_ptr, values_ptr, counts_ptr, scale_ptr, weight_ptr, weight_stride, out_ptr, B, H, BLOCK_J: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rows are the fastest grid axis: programs that run together read the same columns of the weight, from L2."""
    row = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    total = _weighted_sum(
        columns_ptr + row * B,
        values_ptr + row * B,
        tl.load(counts_ptr + row),
        tl.load(scale_ptr + row),
        weight_ptr,
        weight_stride,
        offs_h,
        mask_h,
        BLOCK_J,
        BLOCK_H,
    )
    tl.store(out_ptr + row * H + offs_h, total.to(out_ptr.dtype.element_ty), mask=mask_h)


@triton.jit(do_not_specialize=["group_size", "B"])
def _count_kernel(columns_ptr, counts_ptr, totals_ptr, group_size, B, V, BLOCK_B: tl.constexpr):
    """One row: how often its group has each v; additions of integers, in any order."""
    row = tl.program_id(0).to(tl.int64)
    columns_ptr += row * B
    totals_ptr += row // group_size * V
    count = tl.load(counts_ptr + row)
    for start in range(0, count, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        mask = offs_b < count
        column = tl.load(columns_ptr + offs_b, mask=mask, other=0)
        tl.atomic_add(totals_ptr + column, 1, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["group_size", "N", "B"])
def _place_kernel(
    columns_ptr, values_ptr, counts_ptr, scale_ptr, cursors_ptr, sorted_rows_ptr, sorted_values_ptr, group_size, N, B,
    V, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One group of rows: each entry to the place its cursor points at, which moves on.

    Columns of a row are distinct: its atomics never meet, and their order cannot be seen. Those of the next row come
    after the barrier, and by then this row's have been done in L2, where all threads see them: the stores before the
    barrier go to the addresses that they returned.
    """
    group = tl.program_id(0).to(tl.int64)
    cursors_ptr += group * V
    first = group * group_size
    for row in range(first, min(first + group_size, N)):
        count = tl.load(counts_ptr + row)
        scale = tl.load(scale_ptr + row)
        for start in range(0, count, BLOCK_B):
            offs_b = start + tl.arange(0, BLOCK_B)
            mask = offs_b < count
            column = tl.load(columns_ptr + row * B + offs_b, mask=mask, other=0)
            value = tl.load(values_ptr + row * B + offs_b, mask=mask, other=0.0)
            place = tl.atomic_add(cursors_ptr + column, 1, mask=mask, sem="relaxed").to(tl.int64)
            tl.store(sorted_rows_ptr + place, row, mask=mask)
            tl.store(sorted_values_ptr + place, value * scale, mask=mask)
        tl.debug_barrier()


@triton.jit
def _gather_transposed_kernel(
    rows_ptr, values_ptr, starts_ptr, hidden_ptr, hidden_stride, out_ptr, H, LONG: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One v that is not long, and a block of columns; without entries it is zero."""
    v = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    start = tl.load(starts_ptr + v)
    length = tl.load(starts_ptr + v + 1) - start
    if length <= LONG:
        total = _weighted_sum(
            rows_ptr + start,
            values_ptr + start,
            length,
            1.0,
            hidden_ptr,
            hidden_stride,
            offs_h,
            mask_h,
            BLOCK_J,
            BLOCK_H,
        )
        tl.store(out_ptr + v * H + offs_h, total.to(out_ptr.dtype.element_ty), mask=mask_h)


@triton.jit
def _gather_transposed_long_kernel(
    rows_ptr, values_ptr, starts_ptr, long_ptr, num_long_ptr, hidden_ptr, hidden_stride, out_ptr, H,
    BLOCK_J: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The v of a list that only the device knows the length of: each program takes its share of them."""
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    for i in range(tl.program_id(0), tl.load(num_long_ptr).to(tl.int32), tl.num_programs(0)):
        v = tl.load(long_ptr + i)
        start = tl.load(starts_ptr + v)
        length = tl.load(starts_ptr + v + 1) - start
        total = _weighted_sum(
            rows_ptr + start,
            values_ptr + start,
            length,
            1.0,
            hidden_ptr,
            hidden_stride,
            offs_h,
            mask_h,
            BLOCK_J,
            BLOCK_H,
        )
        tl.store(out_ptr + v * H + offs_h, total.to(out_ptr.dtype.element_ty), mask=mask_h)


@triton.jit
def _bias_kernel(values_ptr, starts_ptr, out_ptr, BLOCK_B: tl.constexpr):
    """One v: the sum of its values; sums per lane first, so that a token of every row does not lose digits."""
    v = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + v)
    length = tl.load(starts_ptr + v + 1) - start
    values_ptr += start
    acc = tl.zeros([BLOCK_B], tl.float32)
    for first in range(0, length, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B)
        acc += tl.load(values_ptr + offs_b, mask=offs_b < length, other=0.0)
    tl.store(out_ptr + v, tl.sum(acc, 0).to(out_ptr.dtype.element_ty))


def gather(entries: Entries, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """d_hidden (n, H) = scale_t · Σ_j values_tj · weight[columns_tj]"""
    columns, values, counts = (t.contiguous() for t in entries)
    (n, most), hidden_size = columns.shape, weight.shape[1]
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    out = torch.empty(n, hidden_size, dtype=dtype, device=weight.device)
    if n:
        tile = choose_tile(hidden_size, weight.dtype)
        _gather_kernel[(n, triton.cdiv(hidden_size, tile["BLOCK_H"]))](
            columns, values, counts, scale.contiguous(), weight, weight.stride(0), out, most, hidden_size, **tile
        )
    return out


def gather_transposed(
    entries: Entries,
    hidden: Tensor,  # (n, H)
    scale: Tensor,  # (n,)
    vocab: int,
    dtype: torch.dtype,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """d_weight (V, H) and d_bias (V,), those that are needed: Σ_t scale_t values_tj (h_t and 1) at v = columns_tj.

    Memory: 8 bytes for each of the n · B entries that there may be, and for the sort 4 · V · (G + 1).
    """
    d_weight = d_bias = None
    if not (need_weight or need_bias):
        return d_weight, d_bias
    rows, values, starts = _sort(entries, scale, vocab)
    if need_weight:
        hidden_size = hidden.shape[1]
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        d_weight = torch.empty(vocab, hidden_size, dtype=dtype, device=hidden.device)
        tile = choose_tile(hidden_size, hidden.dtype)
        long_tile = choose_tile(hidden_size, hidden.dtype, LONG_COLUMNS)
        _gather_transposed_kernel[(vocab, triton.cdiv(hidden_size, tile["BLOCK_H"]))](
            rows, values, starts, hidden, hidden.stride(0), d_weight, hidden_size, LONG=LONG, **tile
        )
        if len(entries.counts) > LONG:  # a v has at most one entry a row
            lengths = starts.diff()
            longest_first = lengths.argsort(descending=True, stable=True)
            grid = (min(LONG_PROGRAMS, vocab), triton.cdiv(hidden_size, long_tile["BLOCK_H"]))
            _gather_transposed_long_kernel[grid](
                rows,
                values,
                starts,
                longest_first,
                (lengths > LONG).sum(),
                hidden,
                hidden.stride(0),
                d_weight,
                hidden_size,
                **long_tile,
            )
    if need_bias:
        d_bias = torch.empty(vocab, dtype=dtype, device=hidden.device)
        _bias_kernel[(vocab,)](values, starts, d_bias, BLOCK_B=BLOCK_B)
    return d_weight, d_bias


def _sort(entries: Entries, scale: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row and scaled value of every entry by vocabulary, then by row; those of v are at starts[v] … starts[v + 1]."""
    columns, values, counts = (t.contiguous() for t in entries)
    n, most = columns.shape
    device = columns.device
    group_size = max(LEAST_ROWS, triton.cdiv(n, MOST_GROUPS))
    groups = triton.cdiv(n, group_size)
    index = torch.int32 if n * most <= MOST_INT32 else torch.int64
    # Row g + 1 of the table counts group g; summed up, row g has what groups before it have, and the last one all.
    cursors = torch.zeros(groups + 1, vocab, dtype=index, device=device)
    if n:
        _count_kernel[(n,)](columns, counts, cursors[1:], group_size, most, vocab, BLOCK_B=BLOCK_B, num_warps=NUM_WARPS)
    cursors.cumsum_(0)
    starts = torch.zeros(vocab + 1, dtype=index, device=device)
    torch.cumsum(cursors[-1], 0, dtype=index, out=starts[1:])
    cursors += starts[:-1]
    sorted_rows = torch.empty(n * most, dtype=torch.int32, device=device)
    sorted_values = torch.empty(n * most, dtype=torch.float32, device=device)
    if n:
        _place_kernel[(groups,)](
            columns, values, counts, scale.contiguous(), cursors, sorted_rows, sorted_values, group_size, n, most,
            vocab, BLOCK_B=BLOCK_B, num_warps=NUM_WARPS,
        )  # fmt: skip
    return sorted_rows, sorted_values, starts


def choose_tile(hidden_size: int, dtype: torch.dtype, most_columns: int = MOST_COLUMNS) -> dict[str, int]:
    """What a program of `_weighted_sum` adds up at a time of a table, by the names that a launch gives it."""
    block_h = min(most_columns, max(32, triton.next_power_of_2(hidden_size)))
    return {"BLOCK_J": min(64, TILE_BYTES // dtype.itemsize // block_h), "BLOCK_H": block_h, "num_warps": NUM_WARPS}
