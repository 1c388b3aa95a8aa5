"""Row operations, as Triton kernels, and with torch where those do not run.

Both modules have the same functions, n rows, V vocabulary, S sequences:
    row_stats(logits (n, V), labels (n,), out=, …)  -> TokenLogp of three (n,); and rows of the gradient
    sequence_sum(values (…, N), cu_seqlens)         -> (…, S)
    sequence_spread(values (S,), cu_seqlens)        -> (N,)
    scale_rows(rows (n, H), scale (n,), …)          -> (n, H)
    times(acc, factor (), dtype)                    -> acc, or a tensor of dtype
"""

from types import ModuleType

from torch import Tensor, compiler

from hdpo_kernels.device import ACCELERATORS
from hdpo_kernels.rows import torch as torch_rows


def backend(tensor: Tensor) -> ModuleType:
    """The module whose row operations run on this tensor."""
    # fp64 exists for checking (gradcheck), not for speed; the Triton kernels compute in fp32. What torch.compile traces
    # through (backward) is torch's: it fuses that itself.
    if tensor.device.type in ACCELERATORS and tensor.element_size() < 8 and not compiler.is_compiling():
        from hdpo_kernels.rows import triton as triton_rows

        return triton_rows
    return torch_rows
