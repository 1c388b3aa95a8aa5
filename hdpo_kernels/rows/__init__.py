"""Row operations on logits, the only part with two implementations: Triton kernels, and torch where those do not run.

Both modules have the same two functions:
    row_stats(logits, labels, bias=, softcap=, logit_scale=, grad_out=, overwrite=, merge=)
        -> RowStats(lse, logp, entropy)
    sequence_sum(values, cu_seqlens)  -> (S,)
"""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from hdpo_kernels.rows import torch as torch_rows

# Writing and reading fp32 logits costs as long as the GEMM itself at H of about 700 on an H200, and less as H grows,
# by traffic alone (README.md); no forward row of benchmarks/results/cuda.csv has confirmed the limit yet.
FUSED_MAX_HIDDEN = 1024


def fused_forward(hidden: Tensor, weight: Tensor) -> Callable[..., torch_rows.RowStats] | None:
    """`fused.linear_stats` where it is the faster way to statistics of rows without gradients, otherwise None."""
    if hidden.device.type != "cuda" or hidden.element_size() != 2 or hidden.shape[1] > FUSED_MAX_HIDDEN:
        return None
    if any(size % 16 for size in (hidden.shape[1], hidden.stride(0), weight.stride(0))):
        return None  # tiles of rows that are not aligned are not loaded ahead
    from hdpo_kernels.fused import linear_stats

    return linear_stats


def backend(tensor: Tensor) -> ModuleType:
    """The module whose row operations run on this tensor."""
    # fp64 exists for checking (gradcheck), not for speed; the Triton kernels compute in fp32.
    if tensor.device.type in ("cuda", "xpu") and tensor.element_size() < 8:
        from hdpo_kernels.rows import triton as triton_rows

        return triton_rows
    return torch_rows
