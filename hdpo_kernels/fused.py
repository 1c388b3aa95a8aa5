"""Fused forward of the LM head: matmul tile → online log-sum-exp, entropy and label's log-prob; no logits in memory.

    hidden (N, H), weight (V, H) ── one program a row block and vocabulary split ──> m, Σe, Σe·d, z_label (splits, N)
                                 ── merge, in a fixed order ──> logp, entropy, is_top1 (N,)

N rows, V vocabulary, H hidden size; z a logit after bias, scale and softcap, m the largest yet, d = z − m, e = exp d.
Inputs bf16, fp16 or fp32; sums fp32. Offsets are int64 before any product with a stride.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from hdpo_kernels.naive import IGNORE_INDEX, TokenLogp
from hdpo_kernels.rows.triton import _head_transform, _is_top1

_IGNORE_INDEX = tl.constexpr(IGNORE_INDEX)
_MERGE_TILE = 2048  # numbers a program of the merge: 16 a thread of four partials, no spill


class Tiles(NamedTuple):
    """One program's share of the matrix product and how it runs, by the names that a launch gives them."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_H: int
    num_warps: int
    num_stages: int


# N differs from step to step, and with it the alignment of what has one number a row
@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["labels_ptr"])
def _linear_stats_kernel(
    hidden_ptr, hidden_stride, weight_ptr, weight_stride, labels_ptr, bias_ptr, max_ptr, sum_e_ptr, sum_ed_ptr,
    z_label_ptr, N, V, H, split_size, softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """m, Σe, Σe·d and z_label of a row block over one split of the vocabulary: split_size entries, whole tiles.

    Row blocks are the fastest grid axis: programs that run together walk the same weight tiles, which stay in L2.
    """
    pid_n, pid_s = tl.program_id(0), tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_h = tl.arange(0, BLOCK_H)
    label = tl.load(labels_ptr + offs_n, mask=mask_n, other=-1)
    label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)  # −1 is no entry of the vocabulary
    # Beyond the end the last row is read again, and never stored: the loops need no mask along N and V.
    row = tl.minimum(offs_n, N - 1).to(tl.int64)
    hidden_ptrs = hidden_ptr + row[:, None] * hidden_stride + offs_h[None, :]

    m = tl.full([BLOCK_N], -float("inf"), tl.float32)
    sum_e = tl.zeros([BLOCK_N], tl.float32)
    sum_ed = tl.zeros([BLOCK_N], tl.float32)
    z_label = tl.zeros([BLOCK_N], tl.float32)
    first = pid_s * split_size
    for start in range(first, min(first + split_size, V), BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        entry = tl.minimum(offs_v, V - 1).to(tl.int64)
        weight_ptrs = weight_ptr + entry[:, None] * weight_stride + offs_h[None, :]
        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for h in range(0, H, BLOCK_H):
            mask_h = (offs_h < H - h)[None, :]
            hidden = tl.load(hidden_ptrs + h, mask=mask_h, other=0.0)
            weight = tl.load(weight_ptrs + h, mask=mask_h, other=0.0)
            z = tl.dot(hidden, tl.trans(weight), z, input_precision="ieee")
        z, _ = _head_transform(z, bias_ptr, offs_v, mask_v, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
        z = tl.where(mask_v[None, :], z, -float("inf"))
        z_label += tl.sum(tl.where(offs_v[None, :] == label[:, None], z, 0.0), 1)

        m_new = tl.maximum(m, tl.max(z, 1))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)  # while all entries so far are −inf
        shift = tl.where(m == -float("inf"), 0.0, m - base)
        rescale = tl.exp(shift)
        d = z - base[:, None]
        e = tl.exp(d)
        sum_ed = rescale * (sum_ed + shift * sum_e) + tl.sum(tl.where(e == 0, 0.0, e * d), 1)  # 0 · −inf is 0 here
        sum_e = rescale * sum_e + tl.sum(e, 1)
        m = m_new

    offs = pid_s.to(tl.int64) * N + offs_n
    tl.store(max_ptr + offs, m, mask=mask_n)
    tl.store(sum_e_ptr + offs, sum_e, mask=mask_n)
    tl.store(sum_ed_ptr + offs, sum_ed, mask=mask_n)
    tl.store(z_label_ptr + offs, z_label, mask=mask_n)


@triton.jit(
    do_not_specialize=["N", "splits"],
    do_not_specialize_on_alignment=["labels_ptr", "logp_ptr", "entropy_ptr", "is_top1_ptr"],
)
def _merge_stats_kernel(
    max_ptr, sum_e_ptr, sum_ed_ptr, z_label_ptr, labels_ptr, logp_ptr, entropy_ptr, is_top1_ptr, N, V, splits,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The statistics of a row from those of its splits, all of them in one tile."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = tl.arange(0, BLOCK_S)
    mask_n = offs_n < N
    offs = offs_s[:, None].to(tl.int64) * N + offs_n[None, :]
    mask = (offs_s < splits)[:, None] & mask_n[None, :]
    label = tl.load(labels_ptr + offs_n, mask=mask_n, other=0)
    split_m = tl.load(max_ptr + offs, mask=mask, other=-float("inf"))
    split_sum_e = tl.load(sum_e_ptr + offs, mask=mask, other=0.0)
    split_sum_ed = tl.load(sum_ed_ptr + offs, mask=mask, other=0.0)
    z_label = tl.sum(tl.load(z_label_ptr + offs, mask=mask, other=0.0), 0)

    m = tl.max(split_m, 0)
    shift = split_m - tl.where(m == -float("inf"), 0.0, m)[None, :]
    rescale = tl.exp(shift)
    total = tl.sum(rescale * split_sum_e, 0)
    # A split without an entry above −inf has shift −inf and rescale 0, and 0 · −inf is 0 here.
    sum_ed = tl.sum(tl.where(rescale == 0, 0.0, rescale * (split_sum_ed + shift * split_sum_e)), 0)
    log_total = tl.log(total)

    logp = tl.where((label >= 0) & (label < V), (z_label - m) - log_total, float("nan"))
    ignored = label == _IGNORE_INDEX
    tl.store(logp_ptr + offs_n, tl.where(ignored, 0.0, logp), mask=mask_n)
    tl.store(entropy_ptr + offs_n, tl.where(ignored, 0.0, log_total - sum_ed / total), mask=mask_n)
    tl.store(is_top1_ptr + offs_n, _is_top1(z_label, m, logp, ignored), mask=mask_n)


def linear_stats(
    hidden: Tensor,  # (N, H) bf16, fp16 or fp32
    weight: Tensor,  # (V, H) of the same dtype
    labels: Tensor,  # (N,) int64
    *,
    out: TokenLogp | None = None,  # where they go
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenLogp:
    """What `row_stats` makes of hidden @ weight.T; memory: 16 bytes a row and split of the vocabulary."""
    (n, hidden_size), vocab = hidden.shape, weight.shape[0]
    out = TokenLogp(*torch.empty(3, n, dtype=torch.float32, device=hidden.device)) if out is None else out
    if n == 0:
        return out
    target, num_sms = _device()
    if triton.knobs.runtime.interpret and hidden.dtype == torch.bfloat16:  # in which the interpreter's tl.dot is wrong
        hidden, weight = hidden.float(), weight.float()
    hidden, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (hidden, weight))
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()

    tiles = choose_tiles(hidden.dtype, target, softcap is not None)
    row_blocks, vocab_tiles = triton.cdiv(n, tiles.BLOCK_N), triton.cdiv(vocab, tiles.BLOCK_V)
    splits = choose_splits(row_blocks, vocab_tiles, num_sms)
    partials = [torch.empty(splits, n, dtype=torch.float32, device=hidden.device) for _ in range(4)]  # each aligned
    _linear_stats_kernel[(row_blocks, splits)](
        hidden, hidden.stride(0), weight, weight.stride(0), labels, hidden if bias is None else bias, *partials,
        n, vocab, hidden_size, triton.cdiv(vocab_tiles, splits) * tiles.BLOCK_V,
        1.0 if softcap is None else float(softcap), float(logit_scale),
        HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
        **tiles._asdict(),
    )  # fmt: skip
    merge = merge_tile(splits)
    _merge_stats_kernel[(triton.cdiv(n, merge["BLOCK_N"]),)](*partials, labels, *out, n, vocab, splits, **merge)
    return out


def choose_tiles(dtype: torch.dtype, target: GPUTarget, softcap: bool) -> Tiles:
    """The widest tiles that spill no register and fit the shared memory; benchmarks/static.py shows what they take."""
    if dtype == torch.float32:  # no matrix instruction on CUDA, where operands pass through registers
        return Tiles(64, 64, 32, num_warps=4, num_stages=2)
    hopper = target.backend == "cuda" and target.arch == 90
    block_v = 256 if hopper else 128
    stages = 4 if hopper else 2 if target.backend == "hip" else 3
    return Tiles(128, block_v // 2 if softcap else block_v, 64, num_warps=8, num_stages=stages)  # tanh takes registers


@functools.lru_cache
def choose_splits(row_blocks: int, vocab_tiles: int, num_sms: int) -> int:
    """Splits of the vocabulary with which num_sms multiprocessors, one program each at a time, are done soonest."""

    def duration(splits: int) -> int:  # in tiles, one more a program to start and to end it
        return triton.cdiv(row_blocks * splits, num_sms) * (triton.cdiv(vocab_tiles, splits) + 1)

    return min(range(1, min(vocab_tiles, num_sms) + 1), key=duration)


def merge_tile(splits: int) -> dict[str, int]:
    block_s = triton.next_power_of_2(splits)
    return {"BLOCK_S": block_s, "BLOCK_N": max(1, _MERGE_TILE // block_s)}


def _device() -> tuple[GPUTarget, int]:
    """What the kernels are compiled for, and how many programs run at a time; the interpreter plays a small Hopper."""
    if triton.knobs.runtime.interpret:
        return GPUTarget("cuda", 90, 32), 4
    driver = triton.runtime.driver.active
    properties = driver.utils.get_device_properties(driver.get_current_device())
    return driver.get_current_target(), properties["multiprocessor_count"]
