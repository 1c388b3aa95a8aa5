"""Numbers in half precision through the branches for CUDA, on a CPU.

Triton's interpreter runs the kernels, and stand-ins that refuse what cuBLAS refuses run the GEMMs with fp32 results.
"""

import pytest
import torch

from benchmarks.fake_gpu import check_gemm
from hdpo_kernels import gemm, linear_hdpo_loss, linear_logp, naive
from hdpo_kernels.testing import (
    assert_as_accurate_as,
    assert_outcome_as_accurate_as,
    run,
    true_outcome,
    zipf_inputs,
)

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py has the same on the device"),
    pytest.mark.parametrize("device", ["triton"], indirect=True),
]
LENGTHS, V, H = [10, 16, 9, 12], 257, 64
GEMM = 2 * sum(LENGTHS) * V * H
FEW_ROWS = V * 18 * 2 + V * 4 * 4  # bytes of 18 rows of gradient and 4 of logits: both pairs are cut in pieces


@pytest.fixture
def flops(device, monkeypatch):
    """Operations in the GEMMs that have a result of another dtype than their operands."""
    done = []

    def product(a, b, out_dtype, out, add=None, alpha=1, beta=1):
        check_gemm(a, b, add, out, out_dtype)
        done.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        result = alpha * (a.float() @ b.float())
        return out.copy_(result if add is None or beta == 0 else result + beta * add)

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", lambda a, b, out_dtype, *, out: product(a, b, out_dtype, out), "CPU")
    library.impl(
        "addmm.dtype_out",
        lambda add, a, b, out_dtype, *, beta=1, alpha=1, out: product(a, b, out_dtype, out, add, alpha, beta),
        "CPU",
    )
    monkeypatch.setattr(gemm, "_has_out_dtype", lambda a: a.element_size() == 2)
    yield done
    library._destroy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_bytes": FEW_ROWS, "nll_weight": 0.1, "bias": True},
        {"softcap": 20.0, "logit_scale": 0.7, "loss_type": "ipo"},
        {"chunk_bytes": FEW_ROWS, "nll_weight": 0.1, "alpha": 0.5, "alpha_level": "token"},
    ],
    ids=["", "pieces, nll, bias", "softcap, scale, ipo", "pieces, nll, by token"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_hdpo_loss_is_as_accurate_as_torch(flops, dtype, options):
    inputs = zipf_inputs(LENGTHS, V, H, dtype=dtype)
    options = {"alpha": 0.95, **options}
    chunk_bytes = options.pop("chunk_bytes", None)
    if options.pop("bias", False):
        options["bias"] = torch.linspace(-1, 1, V).to(dtype)
    actual = run(linear_hdpo_loss, inputs, chunk_bytes=chunk_bytes, **options)
    d_bias = 2 * sum(LENGTHS) * V if "bias" in options else 0
    assert sum(flops) == 2 * GEMM + d_bias  # logits and d_weight; d_hidden is rounded as its operands are
    baseline = run(naive.linear_hdpo_loss, inputs, **options)
    assert_outcome_as_accurate_as(actual, baseline, true_outcome(inputs, **options))


def test_linear_hdpo_loss_leaves_out_rows_that_are_not_scored(flops):
    inputs = zipf_inputs(LENGTHS, V, H, dtype=torch.bfloat16, masked=0.4)
    actual = run(linear_hdpo_loss, inputs, chunk_bytes=FEW_ROWS)
    assert sum(flops) == 2 * 2 * int((inputs.labels >= 0).sum()) * V * H
    assert_outcome_as_accurate_as(actual, run(naive.linear_hdpo_loss, inputs), true_outcome(inputs))


def test_linear_logp_and_its_gradients_are_as_accurate_as_torch(flops):
    inputs = zipf_inputs(LENGTHS, V, H, dtype=torch.bfloat16)
    upstream = torch.linspace(-2, 1, sum(LENGTHS))

    def outcome(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs[:2]]
        token = function(*leaves, inputs.labels)
        gradients = torch.autograd.grad(token.logp, leaves, upstream.to(token.logp.dtype))
        return token.logp.detach(), token.entropy.detach(), *gradients

    actual = outcome(linear_logp, torch.bfloat16)
    assert sum(flops) == 3 * GEMM
    naives = [outcome(naive.linear_logp, dtype) for dtype in (torch.bfloat16, torch.float64)]
    for values in zip(actual, *naives, strict=True):
        assert_as_accurate_as(*values)


def test_sampled_gradient_is_near_the_exact_one(flops):
    inputs = zipf_inputs(LENGTHS, V, H, dtype=torch.bfloat16)
    torch.manual_seed(0)
    actual = run(linear_hdpo_loss, inputs, gradient="sampled", epsilon=2**-7)
    truth = true_outcome(inputs)
    assert sum(flops) == GEMM
    assert (actual.d_hidden - truth.d_hidden).norm() < 0.05 * truth.d_hidden.norm()
    assert (actual.result.logps - truth.result.logps).abs().max() < 0.01
