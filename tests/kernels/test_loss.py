"""linear_hdpo_loss and hdpo_loss against the oracle, over both ways of cutting rows, and what they cost."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hdpo_kernels import HDPOLoss, hdpo_loss, linear_hdpo_loss, linear_logp, naive, sequence_sum
from hdpo_kernels.testing import (
    HeadInputs,
    Operations,
    Outcome,
    assert_as_accurate_as,
    assert_outcome_as_accurate_as,
    run,
    true_outcome,
    zipf_inputs,
)

V, H = 97, 24
LENGTHS = [3, 4, 0, 9, 8, 1, 2, 2]  # with room for 4 rows, pairs 1 and 2 are long; one sequence of them is empty
ROWS = 4

OPTIONS = {
    "hdpo": {"alpha": 0.8, "beta": 0.3},
    "smoothed, nll": {"alpha": 1.2, "beta": 0.3, "label_smoothing": 0.1, "nll_weight": 0.5},
    "hinge": {"beta": 0.05, "loss_type": "hinge", "label_smoothing": 0.1},
    "ipo, nll": {"alpha": 0.9, "beta": 0.2, "loss_type": "ipo", "nll_weight": 0.5},
    "by token, nll": {"alpha": 0.6, "beta": 0.3, "alpha_level": "token", "nll_weight": 0.5},
    "by token, hinge": {"alpha": 1.4, "beta": 0.05, "alpha_level": "token", "loss_type": "hinge"},
    "softcap, scale": {"beta": 0.3, "softcap": 6.0, "logit_scale": 0.7},
}


@pytest.fixture
def without_compaction(monkeypatch):
    """Labels are taken as on a device, where nobody looks at them: rows that are not scored go through the head."""
    monkeypatch.setattr("hdpo_kernels.lm_head._scored", lambda labels: None)


def chunk_bytes(rows: int, inputs: HeadInputs) -> int:
    """What makes pieces of `rows` rows."""
    vocab, size = inputs.weight.shape[0], inputs.hidden.element_size()
    return rows * vocab * size if size >= 4 else -(-rows * vocab * size * 4 // 3)


def check_loss(inputs: HeadInputs, **options) -> None:
    actual = run(linear_hdpo_loss, inputs, **options)
    options.pop("chunk_bytes", None)
    baseline = run(naive.linear_hdpo_loss, inputs, **options)
    assert_outcome_as_accurate_as(actual, baseline, true_outcome(inputs, **options))
    assert actual.result.loss.dtype == torch.promote_types(inputs.hidden.dtype, torch.float32)
    assert actual.d_hidden.dtype == actual.d_weight.dtype == inputs.hidden.dtype


def assert_same(actual: Outcome, expected: Outcome, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for x, y in zip((*actual.result, *actual[1:]), (*expected.result, *expected[1:]), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def assert_equal(actual: Outcome, expected: Outcome) -> None:
    assert_same(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [ROWS, None], ids=["parts of long pairs", "whole pairs"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_linear_hdpo_loss_matches_the_oracle(device, options, rows):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, device=device)
    check_loss(inputs, **options, chunk_bytes=rows and chunk_bytes(rows, inputs))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_linear_hdpo_loss_in_fp64_is_the_oracle(options):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, dtype=torch.float64)
    bias = torch.randn(V, dtype=torch.float64)
    expected = run(naive.linear_hdpo_loss, inputs, bias=bias, **options)
    for rows in (1, ROWS, 13, 100):
        actual = run(linear_hdpo_loss, inputs, bias=bias, chunk_bytes=rows * V * 8, **options)
        assert_same(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_hdpo_loss_in_low_precision_is_as_accurate_as_torch(device, dtype):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, dtype=dtype, device=device)
    bias = torch.randn(V, device=device).to(dtype)
    options = {"alpha": 0.9, "beta": 0.2, "nll_weight": 0.1}
    check_loss(inputs, bias=bias, softcap=6.0, logit_scale=0.7, chunk_bytes=chunk_bytes(ROWS, inputs), **options)
    check_loss(inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [ROWS, None], ids=["parts of long pairs", "whole pairs"])
def test_linear_hdpo_loss_by_token_matches_the_oracle_at_very_unequal_lengths(device, dtype, rows):
    """α_s is 0 for the first chosen (12 against 4 tokens), negative for the second, −3.5 for the last rejected."""
    inputs = zipf_inputs([4, 12, 1, 9, 0, 7, 34, 2], V, H, dtype=dtype, device=device)
    options = {"alpha": 0.5, "beta": 0.2, "alpha_level": "token", "nll_weight": 0.2}
    check_loss(inputs, **options, chunk_bytes=rows and chunk_bytes(rows, inputs))


def test_linear_hdpo_loss_matches_the_oracle_at_ragged_sizes(device):
    inputs = zipf_inputs([2, 3], 32003, 96, dtype=torch.bfloat16, device=device)
    check_loss(inputs, alpha=0.9, chunk_bytes=chunk_bytes(2, inputs))
    check_loss(zipf_inputs([1, 0], V, H, device=device), alpha=0.9)
    check_loss(zipf_inputs([1, 2], 1, 1, device=device), alpha=0.9)


ACCURACIES = {
    "whole pairs": (linear_hdpo_loss, {}),
    "parts of long pairs": (linear_hdpo_loss, {"chunk_bytes": ROWS * V * 4}),
    "two numbers a pair": (linear_hdpo_loss, {"chunk_bytes": ROWS * V * 4, "loss_type": "bco_pair"}),
    "all pairs": (linear_hdpo_loss, {"loss_type": "aot"}),
    "a function": (linear_hdpo_loss, {"loss_type": lambda policy, reference, lengths: -policy[0::2]}),
    "sampled": (linear_hdpo_loss, {"gradient": "sampled", "epsilon": 2**-4}),
    "logits": (lambda hidden, weight, *rest: hdpo_loss(hidden @ weight.T, *rest), {}),
}


@pytest.mark.parametrize(("function", "options"), ACCURACIES.values(), ids=ACCURACIES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_is_that_of_the_oracle_with_ties(device, function, options, dtype):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, device=device)
    hidden, weight = inputs.hidden.round().clamp(-2, 2), (2 * inputs.weight).round().clamp(-2, 2)
    labels = inputs.labels.where(inputs.labels == -100, (hidden @ weight.T).argmax(1))
    labels[::4] = inputs.labels[::4]
    inputs = inputs._replace(hidden=hidden.to(dtype), weight=weight.to(dtype), labels=labels)  # integers: exact logits
    expected = naive.linear_hdpo_loss(*inputs).accuracy
    assert 0 < expected.sum() < 6
    torch.testing.assert_close(run(function, inputs, **options).result.accuracy, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(function(*inputs, **options).accuracy, expected, rtol=1e-6, atol=0)  # no gradient wanted


def test_linear_hdpo_loss_of_equal_logits_is_minus_log_vocab(device):
    hidden, weight = torch.randn(5, H, device=device), torch.ones(V, H, device=device)
    result = linear_hdpo_loss(hidden, weight, torch.tensor([0, 1, 2, -100, 96], device=device), [0, 2, 5], None)
    torch.testing.assert_close(result.logps, torch.full((2,), -2 * math.log(V), device=device))
    torch.testing.assert_close(result.entropy, torch.full((2,), math.log(V), device=device))
    assert float(result.loss) == pytest.approx(math.log(2))


def test_linear_hdpo_loss_chunks_agree(device):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, device=device)
    options = {"alpha": 0.9, "beta": 0.3, "nll_weight": 0.2}
    expected = run(linear_hdpo_loss, inputs, **options)
    for rows in (1, 3, 9, 12):
        assert_same(run(linear_hdpo_loss, inputs, chunk_bytes=chunk_bytes(rows, inputs), **options), expected)


def test_linear_hdpo_loss_is_the_same_without_compaction(device, monkeypatch):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.4, device=device)
    inputs.labels[3:7] = -100  # a sequence of which nothing is scored
    options = {"alpha": 0.9, "loss_type": "ipo", "nll_weight": 0.3, "chunk_bytes": chunk_bytes(ROWS, inputs)}
    on_host = run(linear_hdpo_loss, inputs._replace(labels=inputs.labels.cpu()), **options)
    monkeypatch.setattr("hdpo_kernels.lm_head._scored", lambda labels: None)
    on_device = run(linear_hdpo_loss, inputs, **options)
    assert_same(on_device, on_host)
    truth = true_outcome(inputs, alpha=0.9, loss_type="ipo", nll_weight=0.3)
    assert_same(on_device, Outcome(truth.result, truth.d_hidden, truth.d_weight, None)._replace(
        result=type(truth.result)(*(t.float() for t in truth.result)),
        d_hidden=truth.d_hidden.float(), d_weight=truth.d_weight.float()))  # fmt: skip


@pytest.mark.parametrize("rows", [2, 100])
def test_linear_hdpo_loss_rows_that_are_not_scored_do_not_poison_gradients(without_compaction, device, rows):
    inputs = zipf_inputs([3, 4, 2, 2], V, H, device=device)
    inputs.labels[[1, 5]] = -100
    options = {"alpha": 0.9, "nll_weight": 0.1, "chunk_bytes": chunk_bytes(rows, inputs)}
    bias = torch.randn(V, device=device)
    clean = run(linear_hdpo_loss, inputs, bias=bias, **options)
    inputs.hidden[1], inputs.hidden[5] = torch.nan, torch.inf
    poisoned = run(linear_hdpo_loss, inputs, bias=bias, **options)
    assert_equal(poisoned, clean)
    assert (poisoned.d_hidden[[1, 5]] == 0).all()


def test_linear_hdpo_loss_with_nothing_scored_is_log_two_without_gradient(without_compaction, device):
    inputs = zipf_inputs([3, 2], V, H, masked=1.0, device=device)
    outcome = run(linear_hdpo_loss, inputs._replace(ref_logps=torch.zeros(2, device=device)), nll_weight=1.0)
    assert float(outcome.result.loss) == pytest.approx(math.log(2))
    for tensor in (*outcome.result[1:], outcome.d_hidden, outcome.d_weight):
        assert (tensor == 0).all()


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0, 0]], ids=["no pair", "a pair of nothing"])
def test_linear_hdpo_loss_of_nothing_is_zero(device, cu_seqlens):
    inputs = zipf_inputs([], V, H, device=device)
    inputs = inputs._replace(cu_seqlens=cu_seqlens, ref_logps=torch.zeros(len(cu_seqlens) - 1, device=device))
    outcome = run(linear_hdpo_loss, inputs, bias=torch.zeros(V, device=device))
    assert float(outcome.result.loss) == pytest.approx(math.log(2) if len(cu_seqlens) > 1 else 0.0)
    assert outcome.d_hidden.shape == (0, H) and (outcome.d_weight == 0).all() and (outcome.d_bias == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [2, 100])
def test_linear_hdpo_loss_of_nan_or_inf_is_nan(device, value, rows):
    inputs = zipf_inputs([3, 4], V, H, device=device)
    inputs.hidden[5, 2] = value
    outcome = run(linear_hdpo_loss, inputs, chunk_bytes=chunk_bytes(rows, inputs))
    assert outcome.result.loss.isnan() and outcome.result.logps.isnan().tolist() == [False, True]
    assert outcome.d_weight.isnan().any()


def test_linear_hdpo_loss_of_nan_in_the_weight_or_the_reference_is_nan(device):
    inputs = zipf_inputs([3, 4], V, H, device=device)
    inputs.weight[3, 3] = torch.nan
    assert linear_hdpo_loss(*inputs).loss.isnan()
    inputs = zipf_inputs([3, 4], V, H, device=device)
    inputs.ref_logps[1] = torch.nan
    assert linear_hdpo_loss(*inputs).loss.isnan()


def test_linear_hdpo_loss_label_outside_the_vocabulary_on_a_device_is_nan(without_compaction, device, monkeypatch):
    monkeypatch.setattr("hdpo_kernels.lm_head.check_label_values", lambda *_: None)  # there, nobody looks
    inputs = zipf_inputs([3, 4, 1, 1], V, H, device=device)
    inputs.labels[5] = V
    result = linear_hdpo_loss(*inputs)
    assert result.loss.isnan() and result.logps.isnan().tolist() == [False, True, False, False]


def test_linear_hdpo_loss_of_huge_logits_matches_the_oracle(device):
    inputs = zipf_inputs([3, 4, 2, 2], V, H, device=device)
    inputs = inputs._replace(hidden=inputs.hidden * 1e3)  # logits of about ±1e4
    assert float((inputs.hidden @ inputs.weight.T).abs().max()) > 1e4
    check_loss(inputs, beta=1e-4)


def test_linear_hdpo_loss_with_entries_switched_off_matches_the_oracle(device):
    inputs = zipf_inputs([3, 4, 2, 2], V, H, device=device)
    inputs = inputs._replace(labels=inputs.labels % 50)
    bias = torch.zeros(V, device=device)
    bias[50:] = -torch.inf
    check_loss(inputs, bias=bias, chunk_bytes=chunk_bytes(3, inputs))


def test_linear_hdpo_loss_takes_inputs_that_are_not_contiguous(device):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, device=device)
    bias = torch.randn(V, 2, device=device)
    strided = inputs._replace(
        hidden=torch.stack([inputs.hidden, inputs.hidden], 1).flatten(1)[:, H:],
        weight=inputs.weight.T.contiguous().T,
        labels=inputs.labels.repeat_interleave(2)[::2],
        ref_logps=inputs.ref_logps.repeat_interleave(2)[::2],
    )
    assert not any(t.is_contiguous() for t in (strided.hidden, strided.weight, strided.labels, strided.ref_logps))
    for rows in (ROWS, 100):
        options = {"alpha": 0.9, "chunk_bytes": chunk_bytes(rows, inputs)}
        expected = run(linear_hdpo_loss, inputs, bias=bias[:, 1].contiguous(), **options)
        assert_same(run(linear_hdpo_loss, strided, bias=bias[:, 1], **options), expected)


def test_linear_hdpo_loss_takes_boundaries_as_a_tensor_and_no_reference():
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15)
    zeros = run(linear_hdpo_loss, inputs._replace(ref_logps=torch.zeros(8)))
    for dtype in (torch.int32, torch.int64):
        tensor = inputs._replace(cu_seqlens=torch.tensor(inputs.cu_seqlens, dtype=dtype), ref_logps=None)
        assert_equal(run(linear_hdpo_loss, tensor), zeros)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_losses_take_a_reference_of_any_floating_dtype(dtype):
    inputs = zipf_inputs(LENGTHS, V, H)
    inputs = inputs._replace(ref_logps=inputs.ref_logps.to(torch.bfloat16).float())
    other = inputs._replace(ref_logps=inputs.ref_logps.to(dtype))
    assert_equal(run(linear_hdpo_loss, other), run(linear_hdpo_loss, inputs))
    for x, y in zip(hdpo_loss(logits_of(other), *other[2:]), hdpo_loss(logits_of(inputs), *inputs[2:]), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight")], ids="+".join)
@pytest.mark.parametrize("rows", [ROWS, 100])
def test_linear_hdpo_loss_forms_only_the_gradients_that_are_needed(needs, rows):
    inputs = zipf_inputs(LENGTHS, V, H)
    bias = torch.randn(V)
    options = {"alpha": 0.9, "nll_weight": 0.1, "chunk_bytes": chunk_bytes(rows, inputs)}
    expected = run(linear_hdpo_loss, inputs, bias=bias, **options)
    leaves = {"hidden": inputs.hidden.clone(), "weight": inputs.weight.clone(), "bias": bias}
    for name in needs:
        leaves[name].requires_grad_()
    with Operations() as operations:
        result = linear_hdpo_loss(**inputs._replace(**{k: leaves[k] for k in ("hidden", "weight")})._asdict(),
                                  bias=leaves["bias"], **options)  # fmt: skip
        assert result.loss.requires_grad == bool(needs)
        if needs:
            result.loss.backward()
    n = sum(LENGTHS)
    assert operations.gemm_flops == 2 * n * V * H * (1 + len({"hidden", "weight"} & set(needs))) + (
        2 * n * V if "bias" in needs else 0
    )
    for name, leaf in leaves.items():
        if name in needs:
            torch.testing.assert_close(leaf.grad, getattr(expected, f"d_{name}"), rtol=1e-5, atol=1e-6)
        else:
            assert leaf.grad is None
    if not needs or needs == ("hidden",):
        assert ((V, H), torch.float32) not in operations.made, "no buffer for a gradient of the weight"


def test_linear_hdpo_loss_without_grad_runs_one_gemm_and_gives_the_same_numbers():
    inputs = zipf_inputs(LENGTHS, V, H)
    with_grad = run(linear_hdpo_loss, inputs, chunk_bytes=chunk_bytes(ROWS, inputs))
    inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    with torch.no_grad(), Operations() as operations:
        result = linear_hdpo_loss(*inputs, chunk_bytes=chunk_bytes(ROWS, inputs))
    assert not result.loss.requires_grad
    assert operations.gemm_flops == 2 * sum(LENGTHS) * V * H
    for x, y in zip(result, with_grad.result, strict=True):
        torch.testing.assert_close(x, y)


def test_losses_in_inference_mode_give_the_same_numbers(device):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, device=device)
    expected = linear_hdpo_loss(*inputs)
    with torch.inference_mode():
        copy = inputs._replace(hidden=inputs.hidden.clone())
        logits = logits_of(copy)
        results = [linear_hdpo_loss(*copy)]
        results += [hdpo_loss(logits, *inputs[2:], inplace=inplace) for inplace in (False, True)]
    for result in results:
        for x, y in zip(result, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_linear_hdpo_loss_skips_rows_that_are_not_scored():
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.5)
    scored = int((inputs.labels != -100).sum())
    with Operations() as operations:
        run(linear_hdpo_loss, inputs)
    assert scored < 0.8 * sum(LENGTHS) and operations.gemm_flops == 3 * 2 * scored * V * H


@pytest.mark.parametrize("lengths", [[20] * 30, [300, 300]], ids=["many pairs", "one long pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_hdpo_loss_holds_no_more_logits_than_chunk_bytes(lengths, dtype):
    vocab, hidden_size, rows = 997, 8, 40
    inputs = zipf_inputs(lengths, vocab, hidden_size, dtype=dtype)
    with Operations() as operations:
        run(linear_hdpo_loss, inputs, chunk_bytes=chunk_bytes(rows, inputs), nll_weight=0.1)
    limit = rows * vocab * 4 + 1024  # bf16 rows are upcast for the GEMM; buffers are aligned
    assert operations.largest <= limit < 600 * vocab * 4 / 10


def test_linear_hdpo_loss_keeps_its_buffers_for_the_threads_next_call():
    inputs = zipf_inputs(LENGTHS, V, H)
    first = run(linear_hdpo_loss, inputs)
    with Operations() as operations:
        again = run(linear_hdpo_loss, inputs)
    assert torch.uint8 not in {dtype for _, dtype in operations.made}
    for x, y in zip(first[1:3], again[1:3], strict=True):
        assert torch.equal(x, y)
    with ThreadPoolExecutor(4) as pool:  # threads share no buffer
        for outcome in pool.map(lambda _: run(linear_hdpo_loss, inputs), range(16)):
            assert torch.equal(outcome.d_weight, first.d_weight) and torch.equal(outcome.d_hidden, first.d_hidden)


@pytest.mark.parametrize(
    ("lengths", "nll_weight", "accumulators"),
    [([9, 8, 3, 3], 0.0, 1), ([9, 8, 3, 3], 0.1, 2), ([9, 8] * 3, 0.0, 2), ([9, 8] * 3, 0.1, 2)],
)
def test_linear_hdpo_loss_makes_a_second_weight_gradient_only_where_needed_and_once(lengths, nll_weight, accumulators):
    inputs = zipf_inputs(lengths, V, H)
    with Operations() as operations:
        run(linear_hdpo_loss, inputs, chunk_bytes=chunk_bytes(8, inputs), nll_weight=nll_weight)
    assert operations.made.count(((V, H), torch.float32)) == accumulators


@pytest.mark.parametrize("rows", [ROWS, 100])
def test_linear_hdpo_loss_is_deterministic(device, rows):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, dtype=torch.bfloat16, device=device)
    options = {"alpha": 0.9, "nll_weight": 0.1, "chunk_bytes": chunk_bytes(rows, inputs)}
    assert_equal(run(linear_hdpo_loss, inputs, **options), run(linear_hdpo_loss, inputs, **options))


def test_linear_hdpo_loss_scales_gradients_by_the_upstream_one(device):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, device=device)
    bias = torch.randn(V, device=device)
    once, scaled = (run(linear_hdpo_loss, inputs, bias=bias, d_loss=d_loss) for d_loss in (1.0, -8.0))
    for x, y in zip(scaled[1:], once[1:], strict=True):
        assert torch.equal(x, -8 * y)


def test_linear_hdpo_loss_accumulates_into_parameters():
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15)
    expected = run(linear_hdpo_loss, inputs)
    weight = inputs.weight.clone().requires_grad_()
    losses = [linear_hdpo_loss(inputs.hidden, weight, *inputs[2:]).loss for _ in range(2)]
    (losses[0] + 3 * losses[1]).backward()
    torch.testing.assert_close(weight.grad, 4 * expected.d_weight)


def test_linear_hdpo_loss_leaves_its_inputs_alone(device):
    inputs = zipf_inputs(LENGTHS, V, H, device=device)
    copies = [t.clone() for t in (inputs.hidden, inputs.weight, inputs.labels, inputs.ref_logps)]
    run(linear_hdpo_loss, inputs, chunk_bytes=chunk_bytes(ROWS, inputs))
    for x, y in zip((inputs.hidden, inputs.weight, inputs.labels, inputs.ref_logps), copies, strict=True):
        assert torch.equal(x, y)


def test_linear_hdpo_loss_alone_carries_a_gradient():
    inputs = zipf_inputs(LENGTHS, V, H)
    result = linear_hdpo_loss(inputs.hidden.requires_grad_(), *inputs[1:])
    assert result.loss.requires_grad and not any(t.requires_grad for t in result[1:])


@pytest.mark.parametrize("backward", [torch.Tensor.backward, lambda loss: loss.backward(retain_graph=True)])
def test_linear_hdpo_loss_refuses_a_second_backward(backward):
    inputs = zipf_inputs(LENGTHS, V, H)
    loss = linear_hdpo_loss(inputs.hidden.requires_grad_(), *inputs[1:]).loss
    backward(loss)
    with pytest.raises(RuntimeError, match=r"linear_hdpo_loss are formed in forward and consumed.*call it again"):
        backward(loss)


@pytest.mark.parametrize("rows", [ROWS, 100])
def test_linear_hdpo_loss_under_autocast_returns_gradients_in_the_inputs_dtypes(rows):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15)
    low = inputs.to(torch.bfloat16)
    bias = torch.randn(V)
    options = {"chunk_bytes": chunk_bytes(rows, low), "alpha": 0.9}
    expected = run(linear_hdpo_loss, low, bias=bias.bfloat16(), **options)
    with torch.autocast("cpu", torch.bfloat16):  # forward and backward
        actual = run(linear_hdpo_loss, inputs._replace(hidden=low.hidden), bias=bias, **options)
    dtypes = [t.dtype for t in (actual.result.loss, *actual[1:])]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    rounded = [x.to(y.dtype) for x, y in zip(actual[1:], expected[1:], strict=True)]
    assert_equal(Outcome(actual.result, *rounded), expected)
    assert not torch.equal(actual.d_weight, expected.d_weight.float()), "accumulated in fp32, and not rounded"


def test_linear_hdpo_loss_under_autocast_leaves_fp64_alone():
    inputs = zipf_inputs(LENGTHS, V, H, dtype=torch.float64)
    expected = run(linear_hdpo_loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(run(linear_hdpo_loss, inputs), expected)


@pytest.mark.parametrize("rows", [2, 1000], ids=["parts of long pairs", "whole pairs"])
def test_linear_hdpo_loss_in_fp16_does_not_lose_small_coefficients(rows):
    # 64 pairs and β = 1e-5: |c| is about 1e-7, where fp16 ends.
    inputs = zipf_inputs([3, 2] * 64, 32, 8)
    low = inputs.to(torch.float16)
    with torch.autocast("cpu", torch.float16):
        actual = run(linear_hdpo_loss, inputs, beta=1e-5, chunk_bytes=chunk_bytes(rows, low))
    truth = run(naive.linear_hdpo_loss, low.to(torch.float64), beta=1e-5)
    for name in ("d_hidden", "d_weight"):
        x, y = getattr(actual, name), getattr(truth, name)
        assert (x - y).abs().max() < 2e-3 * y.abs().max(), name


@pytest.mark.parametrize("rows", [100, 1000], ids=["parts of a long pair", "whole pairs"])
def test_linear_hdpo_loss_in_bf16_does_not_round_the_coefficient(rows):
    # |c| = 1.34, halfway between two bf16 numbers, the same for every row: rounded, it would shrink the gradient.
    inputs = zipf_inputs([200, 200], 61, 32)
    low = inputs.to(torch.bfloat16)
    options = {"beta": 171.5 / 128 - 2**-12, "loss_type": "hinge"}
    low = low._replace(ref_logps=true_outcome(low).result.logps.float())
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(linear_hdpo_loss, inputs._replace(ref_logps=low.ref_logps), chunk_bytes=rows * 61 * 3, **options)
    truth = true_outcome(low, **options)
    for x, y in ((actual.d_hidden, truth.d_hidden), (actual.d_weight, truth.d_weight)):
        assert float((x * y).sum() / y.square().sum()) == pytest.approx(1, abs=5e-4)


def test_linear_hdpo_loss_accumulates_the_weight_gradient_in_fp32():
    # In bf16, a sum over 64 chunks would round 64 times.
    inputs = zipf_inputs([16] * 128, 61, 8, dtype=torch.bfloat16)
    truth = true_outcome(inputs)
    actual = run(linear_hdpo_loss, inputs, chunk_bytes=chunk_bytes(32, inputs))
    whole = run(linear_hdpo_loss, inputs)
    assert_as_accurate_as(actual.d_weight, whole.d_weight, truth.d_weight)


def logits_of(inputs: HeadInputs, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (inputs.hidden @ inputs.weight.T).to(dtype)


def run_logits(function, logits, inputs, **options):
    """The result, and the gradient in the logits, which are an intermediate result as a model's are."""
    leaf = logits.detach().requires_grad_()
    result = function(leaf * 1, *inputs[2:], **options)
    (grad,) = torch.autograd.grad(result.loss, leaf)
    return [*(t.detach() for t in result), grad]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hdpo_loss_matches_the_oracle(device, dtype, inplace):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, device=device)
    logits = logits_of(inputs, dtype)
    for options in OPTIONS.values():
        actual = run_logits(hdpo_loss, logits, inputs, inplace=inplace, **options)
        baseline = run_logits(naive.hdpo_loss, logits, inputs, **options)
        truth = run_logits(naive.hdpo_loss, logits.double(), inputs, **options)
        scale = float(truth[1].abs().max())
        for name, x, y, z in zip((*HDPOLoss._fields, "d_logits"), actual, baseline, truth, strict=True):
            assert_as_accurate_as(x, y, z, scale=None if name == "d_logits" else scale, name=name)
        assert actual[-1].dtype == dtype


def test_hdpo_loss_is_linear_hdpo_loss_of_the_logits():
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, dtype=torch.float64)
    options = {"alpha": 0.9, "nll_weight": 0.2, "softcap": 6.0}
    expected = run(linear_hdpo_loss, inputs, **options)
    actual = run_logits(hdpo_loss, logits_of(inputs, torch.float64), inputs, **options)
    for x, y in zip(actual[:-1], expected.result, strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(actual[-1] @ inputs.weight, expected.d_hidden)


def test_hdpo_loss_inplace_makes_no_second_tensor_of_logits():
    inputs = zipf_inputs([50, 50], 32003, 2)
    for inplace in (True, False):
        logits = logits_of(inputs).requires_grad_() * 1
        with Operations() as operations:
            torch.autograd.grad(hdpo_loss(logits, *inputs[2:], inplace=inplace).loss, logits)
        assert (operations.largest == 4 * logits.numel()) == (not inplace)


def test_hdpo_loss_leaves_the_logits_alone_unless_inplace(device):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, device=device)
    logits = logits_of(inputs)
    before = logits.clone()
    hdpo_loss(logits.requires_grad_(), *inputs[2:], softcap=3.0).loss.backward()
    with torch.no_grad():
        hdpo_loss(logits, *inputs[2:], softcap=3.0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_hdpo_loss_takes_logits_that_are_not_contiguous(device, inplace):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, device=device)
    logits = logits_of(inputs)
    expected = run_logits(hdpo_loss, logits, inputs, alpha=0.9)
    layouts = {
        "columns of a wider tensor": lambda x: torch.nn.functional.pad(x, (5, 7))[:, 5:-7],
        "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
        "by column": lambda x: x.T.contiguous().T,
    }
    if inplace:
        del layouts["by column"]
    for name, lay_out in layouts.items():
        leaf = logits.clone().requires_grad_()
        strided = lay_out(leaf)
        assert not strided.is_contiguous()
        result = hdpo_loss(strided, *inputs[2:], alpha=0.9, inplace=inplace)
        (grad,) = torch.autograd.grad(result.loss, leaf)
        for x, y in zip([*result, grad], expected, strict=True):
            torch.testing.assert_close(x, y, msg=name)
        if not inplace:
            assert torch.equal(strided, logits), name


def test_hdpo_loss_inplace_refuses_logits_laid_out_by_column():
    inputs = zipf_inputs([3, 2], V, H)
    logits = logits_of(inputs).T.contiguous().T
    with pytest.raises(ValueError, match=r"inplace=True needs rows .*strides \(1, 5\).*inplace=False"):
        hdpo_loss(logits, *inputs[2:], inplace=True)


def test_hdpo_loss_inplace_refuses_a_leaf_and_a_view_of_one():
    inputs = zipf_inputs([3, 2], V, H)
    leaf = logits_of(inputs).requires_grad_()
    for logits in (leaf, leaf[:], leaf.view(5, V)):
        with pytest.raises(ValueError, match=r"overwrite a leaf that requires grad, or a view of one.*inplace=False"):
            hdpo_loss(logits, *inputs[2:], inplace=True)
    hdpo_loss(leaf.detach().clone(), *inputs[2:], inplace=True)


def test_hdpo_loss_inplace_is_noticed_by_whoever_saved_the_logits(device):
    inputs = zipf_inputs([3, 2], V, H, device=device)
    logits = logits_of(inputs).requires_grad_() * 1
    penalty = logits.square().sum()  # needs the logits in backward
    hdpo_loss(logits, *inputs[2:], inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_hdpo_loss_refuses_a_second_backward():
    inputs = zipf_inputs([3, 2], V, H)
    loss = hdpo_loss(logits_of(inputs).requires_grad_(), *inputs[2:]).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"hdpo_loss are formed in forward and consumed.*call it again"):
        loss.backward()


def test_hdpo_loss_rows_that_are_not_scored_do_not_poison_gradients(device):
    inputs = zipf_inputs([3, 2], V, H, device=device)
    inputs.labels[1] = -100
    logits = logits_of(inputs)
    clean = run_logits(hdpo_loss, logits, inputs)
    logits[1] = torch.nan
    for x, y in zip(run_logits(hdpo_loss, logits, inputs), clean, strict=True):
        assert torch.equal(x, y)


def test_hdpo_loss_of_nothing_is_zero(device):
    logits = torch.zeros(0, V, device=device, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    result = hdpo_loss(logits, labels, [0], None)
    result.loss.backward()
    assert float(result.loss.detach()) == 0 and logits.grad.shape == (0, V)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_functions_make_host_tensors_on_the_cpu_whatever_the_default_device(gradient):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.3)

    def outcome() -> list[torch.Tensor]:
        torch.manual_seed(0)
        loss = run(linear_hdpo_loss, inputs, gradient=gradient, epsilon=2**-4, chunk_bytes=chunk_bytes(ROWS, inputs))
        hidden = inputs.hidden.clone().requires_grad_()
        token = linear_logp(hidden, inputs.weight, inputs.labels, gradient=gradient, epsilon=2**-4)
        sums = sequence_sum(token.logp, inputs.cu_seqlens)
        (grad,) = torch.autograd.grad(sums.sum(), hidden)
        from_logits = hdpo_loss(inputs.hidden @ inputs.weight.T, *inputs[2:])
        return [*loss.result, loss.d_hidden, loss.d_weight, *token, sums, grad, *from_logits]

    expected = outcome()
    with torch.device("meta"):
        got = outcome()
    assert all(map(torch.equal, got, expected))
