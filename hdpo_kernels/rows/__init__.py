"""Row operations, as Triton kernels, and with torch where those do not run.

Both modules have the same functions, n rows, V vocabulary, S sequences:
    row_stats(logits (n, V), labels (n,), out=, …)  -> TokenLogp(logp (n,), entropy (n,)); and rows of the gradient
    sequence_sum(values (…, N), cu_seqlens)         -> (…, S)
    sequence_spread(values (S,), cu_seqlens)        -> (N,)
    scale_rows(rows (n, H), scale (n,), …)          -> (n, H)
    times(acc, factor (), dtype)                    -> acc, or a tensor of dtype
"""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor, compiler

from hdpo_kernels.device import ACCELERATORS
from hdpo_kernels.naive import TokenLogp
from hdpo_kernels.rows import torch as torch_rows

# Writing and reading fp32 logits costs as long as the GEMM itself at H of about 700 on an H200, and less as H grows,
# by traffic alone (README.md); no forward row of benchmarks/results/cuda.csv has confirmed the limit yet.
FUSED_MAX_HIDDEN = 1024


def fused_forward(hidden: Tensor, weight: Tensor) -> Callable[..., TokenLogp] | None:
    """`fused.linear_stats` where it is the faster way to statistics of rows without gradients, otherwise None."""
    if hidden.device.type != "cuda" or hidden.element_size() != 2 or hidden.shape[1] > FUSED_MAX_HIDDEN:
        return None
    if any(size % 16 for size in (hidden.shape[1], hidden.stride(0), weight.stride(0))):
        return None  # tiles of rows that are not aligned are not loaded ahead
    from hdpo_kernels.fused import linear_stats

    return linear_stats


def backend(tensor: Tensor) -> ModuleType:
    """The module whose row operations run on this tensor."""
    # fp64 exists for checking (gradcheck), not for speed; the Triton kernels compute in fp32. What torch.compile traces
    # through (backward) is torch's: it fuses that itself.
    if tensor.device.type in ACCELERATORS and tensor.element_size() < 8 and not compiler.is_compiling():
        from hdpo_kernels.rows import triton as triton_rows

        return triton_rows
    return torch_rows
