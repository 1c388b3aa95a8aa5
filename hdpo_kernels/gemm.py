"""Matrix products of low-precision operands into full-precision results, on any device.

On CUDA the GEMM itself writes fp32 (`out_dtype`), and on ROCm and XPU where their build of torch can. Elsewhere
operands are upcast block by block along the vocabulary, so that no full-precision copy of the weight exists.
"""

import functools

import torch
from torch import Tensor

from hdpo_kernels.device import ACCELERATORS

UPCAST_BLOCK = 8192  # vocabulary entries upcast at a time: 32 MiB for H = 1024


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out (n, V) = a (n, H) @ b (H, V), accumulated and stored in out's dtype."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _has_out_dtype(a):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        a = a.to(out.dtype)
        for v in range(0, b.shape[1], UPCAST_BLOCK):
            block = slice(v, v + UPCAST_BLOCK)
            torch.mm(a, b[:, block].to(out.dtype), out=out[:, block])


def addmm_into(acc: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
    """acc (V, H) = beta · acc + alpha · a (V, n) @ b (n, H), in acc's dtype; beta = 0 ignores what acc holds."""
    if a.dtype == acc.dtype:
        acc.addmm_(a, b, alpha=alpha, beta=beta)
    elif _has_out_dtype(a):
        torch.addmm(acc, a, b, out_dtype=acc.dtype, alpha=alpha, beta=beta, out=acc)
    else:
        b = b.to(acc.dtype)
        for v in range(0, a.shape[0], UPCAST_BLOCK):
            block = slice(v, v + UPCAST_BLOCK)
            acc[block].addmm_(a[block].to(acc.dtype), b, alpha=alpha, beta=beta)


def _has_out_dtype(a: Tensor) -> bool:
    if a.is_cuda and torch.version.hip is None:
        return True  # in every torch that is supported: an fp32 `acc` beside bf16 operands needs 2.10 (pytorch#167931)
    return a.device.type in ACCELERATORS and _takes_out_dtype(a.device.type, a.dtype)


@functools.cache
def _takes_out_dtype(device: str, dtype: torch.dtype) -> bool:
    """Whether this build's GEMMs do, tried once: ROCm has had it since pytorch#162600, XPU may get it."""
    a = torch.ones(16, 16, dtype=dtype, device=device)
    acc = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.mm(a, a, out_dtype=acc.dtype, out=acc)
        torch.addmm(acc, a, a, out_dtype=acc.dtype, out=acc)
    except (RuntimeError, NotImplementedError):
        return False
    return True
