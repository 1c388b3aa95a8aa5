"""Row operations on logits, the only part with two implementations: Triton kernels, and torch where those do not run.

Both modules have the same two functions:
    row_stats(logits, labels, bias=, softcap=, logit_scale=, grad_out=, overwrite=)  -> RowStats(lse, logp, entropy)
    sequence_sum(values, cu_seqlens)  -> (S,)
"""

from types import ModuleType

from torch import Tensor

from hdpo_kernels.rows import torch as torch_rows


def backend(tensor: Tensor) -> ModuleType:
    """The module whose row operations run on this tensor."""
    # fp64 exists for checking (gradcheck), not for speed; the Triton kernels compute in fp32.
    if tensor.device.type in ("cuda", "xpu") and tensor.element_size() < 8:
        from hdpo_kernels.rows import triton as triton_rows

        return triton_rows
    return torch_rows
