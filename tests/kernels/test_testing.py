"""A tolerance that always holds would be worth nothing."""

import pytest
import torch

from hdpo_kernels.testing import Operations, assert_as_accurate_as, zipf_inputs


def test_assert_as_accurate_as_refuses_what_is_worse_than_twice_the_baseline():
    truth = torch.linspace(-1, 1, 101, dtype=torch.float64)
    baseline = (truth + 1e-3).float()
    assert_as_accurate_as((truth - 1.9e-3).float(), baseline, truth)
    with pytest.raises(AssertionError, match="more than twice torch's"):
        assert_as_accurate_as((truth - 2.1e-3).float(), baseline, truth)


def test_assert_as_accurate_as_allows_rounding_and_no_more():
    truth = torch.linspace(-8, 8, 101, dtype=torch.float64)
    assert_as_accurate_as(truth.bfloat16(), truth, truth)
    with pytest.raises(AssertionError, match="largest error"):
        assert_as_accurate_as(truth.bfloat16().double(), truth, truth)


def test_assert_as_accurate_as_refuses_one_wrong_entry_among_many():
    truth = torch.zeros(100_000, dtype=torch.float64)
    truth[0] = 1.0
    actual = truth.float()
    actual[7] = 0.01
    with pytest.raises(AssertionError, match="largest error"):
        assert_as_accurate_as(actual, truth.float(), truth)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_assert_as_accurate_as_refuses_numbers_that_are_not_finite(value):
    truth = torch.zeros(3, dtype=torch.float64)
    actual = torch.tensor([0.0, value, 0.0])
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate_as(actual, truth, truth)
    assert_as_accurate_as(actual, actual, actual.double())
    with pytest.raises(AssertionError, match="where the truth is"):
        assert_as_accurate_as(truth, truth, actual.double())


def test_assert_as_accurate_as_refuses_another_shape():
    with pytest.raises(AssertionError, match=r"shape \(1,\), not \(2,\)"):
        assert_as_accurate_as(torch.zeros(1), torch.zeros(2), torch.zeros(2))


def test_operations_counts_matrix_products_and_what_is_made():
    a, b, out = torch.ones(3, 5), torch.ones(5, 7), torch.zeros(3, 7)
    with Operations() as operations:
        torch.mm(a, b, out=out)
        out.addmm_(a, b)
        a.view(5, 3).mul_(2)
    assert (operations.gemm_flops, operations.made) == (2 * 2 * 3 * 5 * 7, [])
    with Operations() as operations:
        a @ b
        a.new_empty(100)
    assert (operations.gemm_flops, operations.made) == (2 * 3 * 5 * 7, [((3, 7), a.dtype), ((100,), a.dtype)])
    assert operations.largest == 400


def test_zipf_inputs_are_reproducible_and_shaped():
    inputs = zipf_inputs([3, 0, 5, 2], 97, 8, masked=0.3, dtype=torch.bfloat16)
    again = zipf_inputs([3, 0, 5, 2], 97, 8, masked=0.3, dtype=torch.bfloat16)
    assert inputs.hidden.shape == (10, 8) and inputs.weight.shape == (97, 8) and inputs.cu_seqlens == [0, 3, 3, 8, 10]
    assert inputs.hidden.dtype == inputs.weight.dtype == torch.bfloat16 and inputs.ref_logps.dtype == torch.float32
    for x, y in zip(inputs, again, strict=True):
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))
    scored = inputs.labels[inputs.labels != -100]
    assert 0 < len(scored) < 10 and int(scored.min()) >= 0 and int(scored.max()) < 97
