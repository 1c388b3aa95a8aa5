"""The sampled gradient: rows of it rounded, without bias, to a few entries, and their products with matrices.

    g_t = ∂logp_t/∂logits_t = (onehot(y_t) − p_t) · chain_t = E[Σ_j values_tj · onehot(columns_tj)]
    d_hidden_t = c_t · Σ_j values_tj W[columns_tj]        d_weight[v] = Σ_{t, j: columns_tj = v} c_t values_tj h_t

Rows are rounded where logits are at hand, by `rows.row_stats`; README.md has the estimator and its proofs. The modules
torch.py and triton.py have the same two functions, n rows of at most B entries, V vocabulary, H hidden size:
    gather(entries, weight (V, H), scale (n,), dtype)  -> d_hidden (n, H)
    gather_transposed(entries, hidden (n, H), scale (n,), vocab, dtype, need_weight, need_bias)  -> d_weight, d_bias
"""

from types import ModuleType

from torch import Tensor


def products(tensor: Tensor) -> ModuleType:
    """The module whose products run on this tensor."""
    if tensor.device.type in ("cuda", "xpu") and tensor.element_size() < 8:
        from hdpo_kernels.sampled import triton as triton_products

        return triton_products
    from hdpo_kernels.sampled import torch as torch_products

    return torch_products
