"""Sums over sequences: values, gradients, and what they refuse."""

import importlib

import pytest
import torch

from hdpo_kernels import naive, sequence_sum
from hdpo_kernels.testing import assert_as_accurate_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CU_SEQLENS = [0, 3, 3, 8, 10]


def test_sequence_sum_passes_gradcheck_twice():
    values = torch.randn(10, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda v: sequence_sum(v, CU_SEQLENS), values)
    torch.autograd.gradgradcheck(lambda v: sequence_sum(v, CU_SEQLENS) ** 2, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sequence_sum_matches_the_oracle(device, dtype):
    values = torch.randn(3000, device=device).to(dtype).requires_grad_()
    cu_seqlens = [0, 0, 1000, 1001, 3000]
    sums = sequence_sum(values, cu_seqlens)
    truth, baseline = (naive.sequence_sum(values.detach().to(d), cu_seqlens) for d in (torch.float64, torch.float32))
    assert sums.dtype == torch.float32
    assert_as_accurate_as(sums.detach(), baseline, truth)
    d_sums = torch.tensor([1.0, 2.0, -3.0, 4.0], device=device)
    (grad,) = torch.autograd.grad(sums, values, d_sums)
    assert grad.dtype == dtype
    assert grad.tolist() == [2.0] * 1000 + [-3.0] + [4.0] * 1999


def test_sequence_sum_takes_values_and_gradients_that_are_not_contiguous(device):
    values = torch.randn(10, 4, device=device)[:, 1].requires_grad_()
    sums = sequence_sum(values, CU_SEQLENS)
    torch.testing.assert_close(sums, naive.sequence_sum(values.detach(), CU_SEQLENS))
    (grad,) = torch.autograd.grad(sums.sum(), values)  # the upstream gradient is expanded
    assert (grad == 1).all()


def test_sequence_sum_takes_boundaries_as_a_tensor():
    values = torch.randn(10)
    expected = sequence_sum(values, CU_SEQLENS)
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(sequence_sum(values, torch.tensor(CU_SEQLENS, dtype=dtype)), expected)


def test_sequence_sum_of_nothing_is_empty_or_zero(device):
    values = torch.zeros(0, device=device, requires_grad=True)
    assert sequence_sum(values, [0]).shape == (0,)
    assert sequence_sum(values, [0, 0, 0]).tolist() == [0, 0]
    assert torch.autograd.grad(sequence_sum(values, [0, 0]).sum(), values)[0].shape == (0,)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sequence_spread_gives_every_row_its_sequences_value(backend):
    rows, device = importlib.import_module(f"hdpo_kernels.rows.{backend}"), DEVICE if backend == "triton" else "cpu"
    values = torch.tensor([1.5, 2.5, torch.nan, -4.5], device=device)
    expected = torch.tensor([1.5] * 3 + [torch.nan] * 5 + [-4.5] * 2)
    torch.testing.assert_close(rows.sequence_spread(values, CU_SEQLENS).cpu(), expected, equal_nan=True)
    long = [0, 3000, 3001]
    assert rows.sequence_spread(values[:2], long).tolist() == [1.5] * 3000 + [2.5]
    assert rows.sequence_spread(values[:0], [0]).shape == rows.sequence_spread(values[:2], [0, 0, 0]).shape == (0,)


@pytest.mark.parametrize(
    ("values", "message"),
    [(torch.zeros(3, 2), r"shape \(N,\), got torch.float32 \(3, 2\)"), (torch.zeros(3).long(), "got torch.int64")],
)
def test_sequence_sum_refuses_values_that_do_not_fit(values, message):
    with pytest.raises(ValueError, match=message):
        sequence_sum(values, [0, 3])


def test_sequence_sum_refuses_boundaries_that_do_not_cover_the_values():
    with pytest.raises(ValueError, match="from 0 to the number of rows, 3; got 0 … 2"):
        sequence_sum(torch.zeros(3), [0, 2])
    assert sequence_sum(torch.ones(3), [0, 1, 2, 3]).tolist() == [1, 1, 1]  # an odd number of sequences is no fault
