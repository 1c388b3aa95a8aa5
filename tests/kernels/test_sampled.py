"""gradient="sampled" of linear_logp and linear_hdpo_loss: an exact forward, a gradient that is exact on average."""

import pytest
import torch
from torch import Tensor

from hdpo_kernels import linear_hdpo_loss, linear_logp, naive
from hdpo_kernels.naive import IGNORE_INDEX
from hdpo_kernels.sampled.entries import most_entries
from hdpo_kernels.testing import HeadInputs, Operations, run, zipf_inputs

V, H, LENGTHS = 97, 24, [9, 11, 0, 5]
HEAD = {"softcap": 6.0, "logit_scale": 0.7}
BY_TOKEN = {"alpha": 0.7, "alpha_level": "token"}
EPSILON = 2**-5


def relative_error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth.double()).norm() / truth.double().norm())


def logp_and_grads(inputs: HeadInputs, d_logp: Tensor, *, bias: Tensor | None = None, seed: int = 0, **options):
    """logp, entropy, d_hidden, d_weight (, d_bias) of linear_logp."""
    torch.manual_seed(seed)
    leaves = [t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight, bias) if t is not None]
    token = linear_logp(*leaves[:2], inputs.labels, bias=leaves[2] if bias is not None else None, **options)
    return token.logp.detach(), token.entropy.detach(), *torch.autograd.grad(token.logp, leaves, d_logp)


def sampled_loss(inputs: HeadInputs, seed: int = 0, **options):
    torch.manual_seed(seed)
    return run(linear_hdpo_loss, inputs, gradient="sampled", **{"epsilon": EPSILON, **options})


@pytest.mark.parametrize(
    "options", [{}, {"loss_type": "ipo", "nll_weight": 0.3}, {"loss_type": "hinge", **HEAD}, BY_TOKEN]
)
def test_the_forward_is_that_of_the_exact_gradient(device, options):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.2, device=device)
    exact, sampled = run(linear_hdpo_loss, inputs, **options), sampled_loss(inputs, **options)
    for x, y in zip(sampled.result, exact.result, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, V)])
def test_the_mean_of_many_gradients_is_the_exact_one(device, bias, request):
    # The mean of K independent gradients is √K times closer to its expectation than one of them: an unbiased one
    # passes by a factor of two, a bias as large as half of one gradient's error would not.
    repeats = 12 if device == "cpu" and "triton" in request.node.name else 100  # the interpreter takes its time
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.2, sharpness=5, device=device)
    bias = None if bias is None else bias.to(device)
    d_logp = torch.randn(len(inputs.labels), device=device)
    exact = logp_and_grads(inputs, d_logp, bias=bias, **HEAD)[2:]
    draws = [
        logp_and_grads(inputs, d_logp, bias=bias, seed=i, gradient="sampled", epsilon=EPSILON, **HEAD)[2:]
        for i in range(repeats)
    ]
    for truth, *samples in zip(exact, *draws, strict=True):
        single = sum(relative_error(x, truth) ** 2 for x in samples) ** 0.5 / repeats**0.5
        assert single > 0.01 and relative_error(sum(samples) / repeats, truth) < 2 * single / repeats**0.5


def test_linear_hdpo_loss_has_the_gradient_of_its_parts_and_scales_with_the_upstream_one(device):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.2, device=device)
    once, thrice = sampled_loss(inputs), sampled_loss(inputs, d_loss=3.0)
    torch.testing.assert_close(thrice.d_weight, 3 * once.d_weight)
    torch.testing.assert_close(thrice.d_hidden, 3 * once.d_hidden)

    torch.manual_seed(0)
    hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
    token = linear_logp(hidden, weight, inputs.labels, gradient="sampled", epsilon=EPSILON)
    logps = naive.sequence_sum(token.logp, inputs.cu_seqlens)
    naive.pair_loss(logps, inputs.ref_logps, alpha=1.0, beta=0.1).loss.backward()
    torch.testing.assert_close(hidden.grad, once.d_hidden)
    torch.testing.assert_close(weight.grad, once.d_weight)


def test_gradient_error_is_what_the_design_says():
    # Relative errors of d_hidden and d_weight of the design's synthetic model, V = 32,000, H = 1,024, 1.9 nats.
    inputs = zipf_inputs([64] * 4, 32000, 1024)
    exact = run(linear_hdpo_loss, inputs)
    for epsilon, d_hidden, d_weight in ((2**-8, 0.012, 0.038), (2**-10, 0.0052, 0.018), (2**-12, 0.0023, 0.008)):
        sampled = sampled_loss(inputs, epsilon=epsilon)
        assert relative_error(sampled.d_hidden, exact.d_hidden) < 1.5 * d_hidden
        assert relative_error(sampled.d_weight, exact.d_weight) < 1.5 * d_weight


def test_the_gradient_is_exact_where_no_probability_is_between_zero_and_epsilon():
    inputs = zipf_inputs([5, 6], V, H, dtype=torch.float64)
    inputs = inputs._replace(
        hidden=0.01 * inputs.hidden
    )  # the first 20 entries get about 1/20 each, the others nothing
    bias = torch.where(torch.arange(V) < 20, 0.0, -1e4).double()
    inputs.labels.clamp_(max=19)
    d_logp = torch.randn(11, dtype=torch.float64)
    exact = logp_and_grads(inputs, d_logp, bias=bias)
    sampled = logp_and_grads(inputs, d_logp, bias=bias, gradient="sampled", epsilon=2**-5)
    for x, y in zip(sampled, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_those_of_fp32_rounded_once(device, dtype):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.2, dtype=dtype, device=device)
    low, high = sampled_loss(inputs), sampled_loss(inputs.to(torch.float32))
    for name in ("d_hidden", "d_weight"):
        x, y = getattr(low, name), getattr(high, name)
        assert x.dtype == dtype
        torch.testing.assert_close(x, y.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_seed_reproduces_the_bits_and_another_seed_does_not(device):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.2, sharpness=5, dtype=torch.bfloat16, device=device)
    first, again, other = (sampled_loss(inputs, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.d_hidden, again.d_hidden) and torch.equal(first.d_weight, again.d_weight)
    assert not torch.equal(first.d_hidden, other.d_hidden)


def test_chunks_take_the_same_entries(device):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.2, device=device)
    whole, chunked = sampled_loss(inputs), sampled_loss(inputs, chunk_bytes=3 * V * 4)
    torch.testing.assert_close(chunked.d_hidden, whole.d_hidden)
    torch.testing.assert_close(chunked.d_weight, whole.d_weight)


def test_nothing_is_drawn_where_no_gradient_is_wanted():
    inputs = zipf_inputs(LENGTHS, V, H)
    state = torch.get_rng_state()
    with Operations() as operations:
        token = linear_logp(*inputs[:3], gradient="sampled", epsilon=EPSILON)
    assert torch.equal(torch.get_rng_state(), state) and not token.logp.requires_grad
    assert all(shape != (len(inputs.labels), most_entries(EPSILON)) for shape, _ in operations.made)


@pytest.mark.parametrize("needs", ["hidden", "weight", "bias"])
def test_one_gemm_in_all_and_only_the_gradients_that_are_needed(needs, monkeypatch):
    from hdpo_kernels.sampled import torch as products

    called = []
    for name in ("gather", "gather_transposed"):
        function = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *a, f=function, n=name: called.append((n, *a[5:])) or f(*a))
    inputs = zipf_inputs([20], V, H)
    leaves = {"hidden": inputs.hidden, "weight": inputs.weight, "bias": torch.zeros(V)}
    leaves[needs].requires_grad_()
    with Operations() as operations:
        linear_logp(labels=inputs.labels, gradient="sampled", epsilon=EPSILON, **leaves).logp.sum().backward()
    assert operations.gemm_flops == 2 * 20 * V * H
    assert all((t.grad is not None) == (name == needs) for name, t in leaves.items())
    expected = {"hidden": ("gather",), "weight": ("gather_transposed", True, False)}
    assert called == [expected.get(needs, ("gather_transposed", False, True))]


def test_rows_that_are_not_scored_do_not_poison_gradients(device, monkeypatch):
    monkeypatch.setattr("hdpo_kernels.lm_head._scored", lambda labels: None)  # as on a device: they are not left out
    inputs = zipf_inputs([9, 4], V, H, device=device)
    inputs.labels[4] = IGNORE_INDEX
    clean = sampled_loss(inputs)
    inputs.hidden[4] = torch.nan
    dirty = sampled_loss(inputs)
    assert torch.equal(clean.d_weight, dirty.d_weight) and torch.equal(clean.d_hidden, dirty.d_hidden)
    assert (dirty.d_hidden[4] == 0).all()


def test_a_nan_comes_out_as_nan(device):
    inputs = zipf_inputs([9, 4], V, H, device=device)
    inputs.hidden[4, 3] = torch.nan
    outcome = sampled_loss(inputs)
    assert outcome.result.loss.isnan() and outcome.d_hidden[4].isnan().all() and outcome.d_weight.isnan().any()


def test_nothing_scored_gives_zeros(device):
    for lengths, masked in (([], 0.0), ([0, 0], 0.0), ([3, 2], 1.0)):
        inputs = zipf_inputs(lengths, V, H, masked=masked, device=device)
        outcome = sampled_loss(inputs)
        assert (outcome.d_hidden == 0).all() and (outcome.d_weight == 0).all()
        assert outcome.d_hidden.shape == inputs.hidden.shape and outcome.d_weight.shape == (V, H)


def test_autocast_gives_gradients_in_the_inputs_dtypes():
    inputs = zipf_inputs(LENGTHS, V, H)
    with torch.autocast("cpu", torch.bfloat16):
        outcome = sampled_loss(inputs)
    assert outcome.d_hidden.dtype == outcome.d_weight.dtype == torch.float32
    exact = run(linear_hdpo_loss, inputs)
    assert relative_error(outcome.d_hidden, exact.d_hidden) < 0.2


def test_a_gradient_through_entropy_is_refused():
    inputs = zipf_inputs([9], V, H)
    token = linear_logp(inputs.hidden.requires_grad_(), *inputs[1:3], gradient="sampled", epsilon=EPSILON)
    with pytest.raises(NotImplementedError, match=r"no gradient through entropy: detach it, or use .*naive"):
        token.entropy.sum().backward()


def test_a_second_backward_uses_the_same_entries():
    inputs = zipf_inputs([9], V, H)
    hidden = inputs.hidden.requires_grad_()
    total = linear_logp(hidden, *inputs[1:3], gradient="sampled", epsilon=EPSILON).logp.square().sum()
    (first,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(total, hidden)
    assert torch.equal(first, second)


def test_memory_is_that_of_the_bound_beside_one_chunk_of_logits():
    inputs = zipf_inputs([600, 600], 4099, 16)
    rows = 10
    with Operations() as operations:
        sampled_loss(inputs, epsilon=2**-6, chunk_bytes=rows * 4099 * 4)
    largest = max(rows * 4099 * 4, 1200 * most_entries(2**-6) * 8)
    assert operations.largest <= 2.5 * largest < 1200 * 4099 * 4 / 5
