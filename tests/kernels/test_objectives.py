"""Every loss type: derivatives against autograd over extreme inputs, TRL's own values, and the head's ways to each."""

import itertools

import pytest
import torch

from hdpo_kernels import HDPOLoss, hdpo_loss, linear_hdpo_loss, naive, pair_loss
from hdpo_kernels.objectives import ALL, OBJECTIVES, ONE, TWO
from hdpo_kernels.pair import LOSS_TYPES, PairOptions
from hdpo_kernels.testing import Operations, run, true_outcome, zipf_inputs
from tests.kernels.test_loss import LENGTHS, ROWS, H, V, assert_same, check_loss, chunk_bytes

NUMBERS = [0.0, 1e-3, -1e-3, 0.7, -0.7, 3.0, -3.0, 30.0, -30.0]
NEW = [name for name in LOSS_TYPES if name not in ("sigmoid", "hinge", "ipo")]
SMOOTHED = {name: 0.1 for name, objective in OBJECTIVES.items() if objective.smoothing != "no"}


def options_of(name: str, **more) -> dict:
    return {"alpha": 0.8, "beta": 0.3, "loss_type": name, "label_smoothing": SMOOTHED.get(name, 0.0), **more}


@pytest.mark.parametrize("name", [name for name in LOSS_TYPES if OBJECTIVES[name].of in (ONE, TWO)])
def test_slopes_are_the_derivatives_at_numbers_of_any_size(name):
    options, count = PairOptions(**options_of(name)), 1 if OBJECTIVES[name].of == ONE else 2
    grid = torch.tensor(list(itertools.product(NUMBERS, repeat=count)), dtype=torch.float64)
    leaves = [column.clone().requires_grad_() for column in grid.T]
    value, *slopes = OBJECTIVES[name].f(*leaves, options)
    expected = torch.autograd.grad(value.sum(), leaves)
    for slope, truth in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope.detach(), truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NEW)
def test_extreme_log_probs_stay_finite_where_the_loss_is(name):
    ref = torch.tensor([0.0, 0.0, -300.0, 0.0, 0.0, -300.0, -1e4, -1e4])
    logps = torch.tensor([-300.0, 0.0, 0.0, -300.0, -1e4, 0.0, 0.0, -1e4]).requires_grad_()
    result = pair_loss(logps, ref, lengths=torch.full((8,), 10), **options_of(name, beta=0.05))
    (grad,) = torch.autograd.grad(result.loss, logps)
    truth = logps.detach().double().requires_grad_()
    options = options_of(name, beta=0.05, lengths=torch.full((8,), 10.0).double())
    expected = naive.pair_loss(truth, ref.double(), **options).loss
    if expected.isfinite():
        torch.testing.assert_close(result.loss.detach().double(), expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad.double(), torch.autograd.grad(expected, truth)[0], rtol=1e-3, atol=1e-6)


def squared(policy, reference, lengths):
    return (policy - reference).view(-1, 2).diff(dim=1).squeeze(1) ** 2 / lengths[0::2].clamp(min=1)


MIXES = {
    "a mix": {"loss_type": ["sigmoid", "apo_zero", "sft"], "loss_weights": [1.0, 0.5, 0.2], "beta": 0.2},
    "one number": {"loss_type": ["sigmoid", "hinge", "sft"], "loss_weights": [1.0, 0.5, 0.2], "beta": 0.2},
    "a divergence": {"f_divergence_type": "forward_kl", "alpha": 1.01, "beta": 0.02},
    "by token": {"loss_type": "nca_pair", "alpha": 0.5, "alpha_level": "token", "nll_weight": 0.3},
    "all pairs": {"loss_type": ["aot", "sigmoid"], "nll_weight": 0.3, "beta": 0.2},
}


@pytest.mark.parametrize("rows", [ROWS, None], ids=["parts of long pairs", "whole pairs"])
@pytest.mark.parametrize("options", [*map(options_of, NEW), *MIXES.values()], ids=[*NEW, *MIXES])
def test_linear_hdpo_loss_of_every_loss_matches_the_oracle(options, rows):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, dtype=torch.float64)
    expected = run(naive.linear_hdpo_loss, inputs, **options)
    actual = run(linear_hdpo_loss, inputs, **options, chunk_bytes=rows and rows * V * 8)
    assert_same(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [options_of("apo_down"), options_of("sppo_hard"), MIXES["a mix"]], ids=str)
def test_losses_of_two_numbers_are_as_accurate_as_torch(device, options, dtype):
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, dtype=dtype, device=device)
    check_loss(inputs, **options, chunk_bytes=chunk_bytes(ROWS, inputs))


@pytest.mark.parametrize("options", [options_of("aot"), options_of("apo_zero"), MIXES["a mix"]], ids=str)
def test_hdpo_loss_from_logits_and_the_sampled_gradient_have_every_loss(options):
    inputs = zipf_inputs(LENGTHS, V, H, dtype=torch.float64)
    truth = run(naive.linear_hdpo_loss, inputs, **options)
    logits = (inputs.hidden @ inputs.weight.T).requires_grad_()
    result = hdpo_loss(logits, *inputs[2:5], **options)
    result.loss.backward()
    torch.testing.assert_close(result.loss, truth.result.loss)
    torch.testing.assert_close(logits.grad @ inputs.weight, truth.d_hidden, rtol=1e-9, atol=1e-12)
    sampled = run(linear_hdpo_loss, inputs, gradient="sampled", epsilon=0.02, **options)
    torch.testing.assert_close(sampled.result.loss, truth.result.loss)


@pytest.mark.parametrize(("name", "gemms"), [("apo_zero", 3), ("exo_pair", 3), ("sft", 3), ("aot", 4)])
def test_what_a_loss_costs(name, gemms):
    inputs = zipf_inputs([40, 50, 30, 60], 4000, 64)
    with Operations() as operations:
        run(linear_hdpo_loss, inputs, **options_of(name))
    assert operations.gemm_flops == pytest.approx(gemms * 2 * 180 * 4000 * 64, rel=0.02)


def test_a_function_of_ones_own_is_a_loss():
    inputs = zipf_inputs(LENGTHS, V, H, masked=0.15, dtype=torch.float64)
    options = {"alpha": 0.8, "beta": 0.3}
    actual = run(linear_hdpo_loss, inputs, loss_type=squared, **options)
    hidden, weight = (t.clone().requires_grad_() for t in inputs[:2])
    logps = naive.sequence_sum(naive.linear_logp(hidden, weight, inputs.labels).logp, inputs.cu_seqlens)
    lengths = naive.sequence_sum((inputs.labels != -100).double(), inputs.cu_seqlens)
    loss = squared(0.8 * logps, inputs.ref_logps, lengths).mean()
    torch.testing.assert_close(actual.result.loss, loss.detach())
    expected = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close((actual.d_hidden, actual.d_weight), expected, rtol=1e-9, atol=1e-12)
    rewards = true_outcome(inputs, **options).result
    for field in set(HDPOLoss._fields) - {"loss"}:
        torch.testing.assert_close(getattr(actual.result, field), getattr(rewards, field).detach(), msg=field)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]}, r"a weight for each loss: 2 \(sigmoid, hinge\)"),
        ({"loss_type": "hinge", "loss_weights": [-1.0]}, "loss_weights must be positive numbers, got -1.0"),
        ({"loss_type": "exo_pair"}, "exo_pair' needs label_smoothing > 0"),
        ({"loss_type": "apo_zero", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect on apo_zero"),
        ({"loss_type": "sigmoid_norm", "alpha_level": "token"}, "sigmoid_norm' averages log-probabilities over tokens"),
        ({"f_divergence_type": "kl"}, "f_divergence_type must be one of reverse_kl, forward_kl"),
        ({"loss_type": "aot", "f_divergence_type": "forward_kl"}, "losses of a margin, and aot is none"),
        ({"discopop_tau": 0.0}, "discopop_tau must be a positive number, got 0.0"),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect without loss_type='discopop'"),
        ({"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef=0.7 has no effect without f_divergence_type"),
        ({"f_alpha_divergence_coef": float("nan")}, "f_alpha_divergence_coef must be a finite number, got nan"),
        ({"loss_type": squared}, "a loss_type that is a function needs log-probs of every token: use linear_hdpo_loss"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PairOptions(1.0, 0.1, **options)


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 0.1}, {"nll_weight": 1.0}, {"loss_weights": [2.0]}, {"f_divergence_type": "forward_kl"}],
    ids=str,
)
def test_options_that_a_function_of_ones_own_does_not_see_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* has no effect on a loss_type that is a function"):
        linear_hdpo_loss(*zipf_inputs(LENGTHS, V, H)[:5], loss_type=squared, **options)


def test_a_weight_of_zero_that_alpha_by_token_gives_a_sequence_is_no_nan():
    inputs = zipf_inputs([60, 20, 30, 30], V, H, dtype=torch.float64)  # alpha_s of the second: 0.5 + (0.5 - 1) * 40/40
    options = options_of("apo_zero", alpha=0.5, alpha_level="token")
    expected = run(naive.linear_hdpo_loss, inputs, **options)
    assert_same(run(linear_hdpo_loss, inputs, **options, chunk_bytes=ROWS * V * 8), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [ROWS, None], ids=["parts of long pairs", "whole pairs"])
def test_steep_losses_do_not_overflow_in_fp16(rows):
    inputs = zipf_inputs([6, 20, 30, 30], V, H, dtype=torch.float16)
    options = {"loss_type": "sppo_hard", "beta": 0.005, "alpha": 1.0}  # its slope in rewards is 1/β²
    check_loss(inputs, **options, chunk_bytes=rows and chunk_bytes(rows, inputs))


def test_a_loss_of_all_pairs_is_one_of_all_pairs_alone():
    assert {name for name in LOSS_TYPES if PairOptions(**options_of(name)).kind == ALL} == {"aot", "aot_unpaired"}
    assert PairOptions(1.0, 0.1, ["sigmoid", "ipo"]).kind == TWO  # scales that differ
    assert PairOptions(1.0, 0.1, ["sigmoid", "hinge", "sft"]).kind == ONE
