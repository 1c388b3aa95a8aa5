"""Per-token log-probs and their gradients against the oracle, and what they cost."""

import pytest
import torch

from hdpo_kernels import linear_logp, naive, sequence_sum
from hdpo_kernels.testing import Operations, assert_as_accurate_as, zipf_inputs

V, H = 97, 24
HEAD = {"softcap": 6.0, "logit_scale": 0.7}


@pytest.fixture
def without_compaction(monkeypatch):
    """Labels are taken as on a device, where nobody looks at them: rows that are not scored go through the head."""
    monkeypatch.setattr("hdpo_kernels.lm_head._scored", lambda labels: None)


def run_logp(function, inputs, d_logp, bias=None, **options):
    """logp, entropy, and the gradients of Σ d_logp · logp in hidden, weight (and bias)."""
    leaves = [t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight, bias) if t is not None]
    token = function(*leaves[:2], inputs.labels, bias=leaves[2] if bias is not None else None, **options)
    grads = torch.autograd.grad(token.logp, leaves, d_logp.to(token.logp.dtype))
    return token.logp.detach(), token.entropy.detach(), *grads


def check_logp(inputs, *, bias=None, head=None, **options):
    head = head or {}
    torch.manual_seed(0)
    d_logp = torch.randn(len(inputs.labels), device=inputs.labels.device)
    actual = run_logp(linear_logp, inputs, d_logp, bias, **head, **options)
    baseline = run_logp(naive.linear_logp, inputs, d_logp, bias, **head)
    exact = inputs.to(torch.float64)
    truth = run_logp(naive.linear_logp, exact, d_logp, None if bias is None else bias.double(), **head)
    scale = float((exact.hidden @ exact.weight.T).abs().max())
    for i, (name, size) in enumerate(
        [("logp", scale), ("entropy", scale), ("d_hidden", None), ("d_weight", None), ("d_bias", None)][: len(truth)]
    ):
        assert_as_accurate_as(actual[i], baseline[i], truth[i], scale=size, name=name)
    assert actual[0].dtype == actual[1].dtype == torch.promote_types(inputs.hidden.dtype, torch.float32)
    assert all(grad.dtype == inputs.hidden.dtype for grad in actual[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_logp_matches_the_oracle(device, dtype):
    inputs = zipf_inputs([9, 11], V, H, masked=0.2, dtype=dtype, device=device)
    check_logp(inputs)
    bias = torch.randn(V, device=device).to(dtype)
    check_logp(inputs, bias=bias, head=HEAD, chunk_bytes=1)


def test_linear_logp_matches_the_oracle_at_ragged_sizes(device):
    check_logp(zipf_inputs([3], 32003, 96, dtype=torch.bfloat16, device=device))
    check_logp(zipf_inputs([1], 1, 1, device=device))


def test_linear_logp_passes_gradcheck():
    inputs = zipf_inputs([5], 7, 4, masked=0.3, dtype=torch.float64)
    bias = torch.randn(7, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.weight, bias)]
    torch.autograd.gradcheck(
        lambda h, w, b: linear_logp(h, w, inputs.labels, bias=b, chunk_bytes=2 * 7 * 8, **HEAD).logp, leaves
    )


def test_linear_logp_of_equal_logits_is_minus_log_vocab(device):
    token = linear_logp(
        torch.randn(3, H, device=device), torch.ones(V, H, device=device), torch.tensor([0, 96, -100], device=device)
    )
    expected = torch.tensor([V, V, 1.0], device=device).log()
    torch.testing.assert_close(token.logp, -expected)
    torch.testing.assert_close(token.entropy, expected)


def test_linear_logp_is_the_same_without_compaction(without_compaction, device):
    check_logp(zipf_inputs([9, 11], V, H, masked=0.3, device=device), chunk_bytes=3 * V * 4)


def test_linear_logp_rows_that_are_not_scored_do_not_poison_gradients(without_compaction, device):
    inputs = zipf_inputs([9], V, H, device=device)
    inputs.labels[4] = -100
    clean = run_logp(linear_logp, inputs, torch.ones(9, device=device))
    inputs.hidden[4] = torch.nan
    for x, y in zip(run_logp(linear_logp, inputs, torch.ones(9, device=device)), clean, strict=True):
        assert torch.equal(x, y)


def test_linear_logp_of_nan_is_nan_in_its_row_alone(device):
    inputs = zipf_inputs([9], V, H, device=device)
    inputs.hidden[4, 3] = torch.nan
    token = linear_logp(*inputs[:3])
    assert (token.logp.isnan() == (torch.arange(9, device=device) == 4)).all()


def test_linear_logp_of_nothing(device):
    inputs = zipf_inputs([], V, H, device=device)
    logp, entropy, d_hidden, d_weight = run_logp(linear_logp, inputs, torch.zeros(0, device=device))
    assert logp.shape == entropy.shape == (0,) and d_hidden.shape == (0, H) and (d_weight == 0).all()
    masked = zipf_inputs([3], V, H, masked=1.0, device=device)
    for tensor in run_logp(linear_logp, masked, torch.ones(3, device=device)):
        assert (tensor == 0).all()


def test_linear_logp_chunks_agree(device):
    inputs = zipf_inputs([20], V, H, masked=0.2, device=device)
    d_logp = torch.randn(20, device=device)
    whole = run_logp(linear_logp, inputs, d_logp)
    for rows in (1, 3, 19):
        for x, y in zip(run_logp(linear_logp, inputs, d_logp, chunk_bytes=rows * V * 4), whole, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_linear_logp_takes_inputs_that_are_not_contiguous(device):
    inputs = zipf_inputs([9], V, H, device=device)
    bias = torch.randn(V, 2, device=device)
    expected = run_logp(linear_logp, inputs, torch.ones(9, device=device), bias[:, 1].contiguous())
    strided = inputs._replace(
        hidden=torch.stack([inputs.hidden, inputs.hidden], 1).flatten(1)[:, H:],
        weight=inputs.weight.T.contiguous().T,
        labels=inputs.labels.repeat_interleave(2)[::2],
    )
    d_logp = torch.ones((), device=device).expand(9)
    for x, y in zip(run_logp(linear_logp, strided, d_logp, bias[:, 1]), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needs", ["hidden", "weight", "bias", "nothing"])
def test_linear_logp_forms_only_the_gradients_that_are_needed(needs):
    inputs = zipf_inputs([20], V, H)
    leaves = {"hidden": inputs.hidden, "weight": inputs.weight, "bias": torch.zeros(V)}
    gemm = 2 * 20 * V * H
    if needs != "nothing":
        leaves[needs].requires_grad_()
    with Operations() as forward:
        token = linear_logp(labels=inputs.labels, **leaves)
    assert forward.gemm_flops == gemm
    assert token.logp.requires_grad == (needs != "nothing")
    if needs == "nothing":
        return
    with Operations() as backward:
        token.logp.sum().backward()
    assert backward.gemm_flops == {"hidden": 2 * gemm, "weight": 2 * gemm, "bias": gemm + 2 * 20 * V}[needs]
    assert all((t.grad is not None) == (name == needs) for name, t in leaves.items())


def test_linear_logp_holds_no_more_logits_than_chunk_bytes():
    inputs = zipf_inputs([600], 997, 8, dtype=torch.bfloat16)
    rows = 10
    with Operations() as operations:
        run_logp(linear_logp, inputs, torch.ones(600), chunk_bytes=rows * 997 * 4)
    assert operations.largest <= 1.6 * rows * 997 * 4 < 600 * 997 * 4 / 10  # 16 rows of bf16, upcast for the GEMM


def test_linear_logp_refuses_a_gradient_through_entropy():
    inputs = zipf_inputs([9], V, H, masked=0.2)
    hidden = inputs.hidden.requires_grad_()
    token = linear_logp(hidden, *inputs[1:3])
    with pytest.raises(NotImplementedError, match=r"no gradient through entropy: detach it, or use .*naive"):
        token.entropy.sum().backward()
    token = linear_logp(hidden, *inputs[1:3])
    (token.logp.sum() + 0.1 * token.entropy.detach().sum()).backward()


def test_linear_logp_allows_a_second_backward_and_refuses_a_double_one():
    inputs = zipf_inputs([9], V, H)
    hidden = inputs.hidden.requires_grad_()
    total = linear_logp(hidden, *inputs[1:3]).logp.square().sum()
    (first,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(total, hidden, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


def test_linear_logp_is_deterministic(device):
    inputs = zipf_inputs([40], V, H, masked=0.2, dtype=torch.bfloat16, device=device)
    first, second = (run_logp(linear_logp, inputs, torch.ones(40, device=device), chunk_bytes=4000) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_linear_logp_under_autocast_returns_gradients_in_the_inputs_dtypes():
    inputs = zipf_inputs([9], V, H, masked=0.2)
    low = inputs.to(torch.bfloat16)
    expected = run_logp(linear_logp, low, torch.ones(9))
    mixed = inputs._replace(hidden=low.hidden)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_logp(linear_logp, mixed, torch.ones(9))
    assert [t.dtype for t in actual] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.to(y.dtype), y, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_linear_logp_in_fp16_takes_gradients_of_any_size(size):
    # Under autocast, inputs in fp32: their gradients have room for what fp16 has not.
    inputs = zipf_inputs([40], V, H)
    low, d_logp = inputs.to(torch.float16), size * torch.randn(40)
    with torch.autocast("cpu", torch.float16):
        grads = run_logp(linear_logp, inputs, d_logp)[2:]
    for grad, truth in zip(grads, run_logp(naive.linear_logp, low.to(torch.float64), d_logp)[2:], strict=True):
        assert (grad - truth).abs().max() < 2e-3 * truth.abs().max()


def test_linear_logp_of_2048_tokens_in_bf16_is_within_0_02_nat():
    # Plain torch, with logits in bf16, is 0.1 to 0.3 nat off here.
    inputs = zipf_inputs([2048], 32000, 256, dtype=torch.bfloat16)
    exact = inputs.to(torch.float64)
    with torch.no_grad():
        logp = linear_logp(*inputs[:3]).logp
        parts = [slice(i, i + 256) for i in range(0, 2048, 256)]
        truth = sum(float(naive.linear_logp(exact.hidden[r], exact.weight, exact.labels[r]).logp.sum()) for r in parts)
    assert abs(float(sequence_sum(logp, [0, 2048])) - truth) < 0.02
