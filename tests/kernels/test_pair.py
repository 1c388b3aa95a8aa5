"""The loss maths against the oracle, and the one number per sequence that the heavy part needs against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F

from hdpo_kernels import HDPOLoss, naive, pair, pair_loss
from hdpo_kernels.pair import PairOptions

OPTIONS = [
    {"alpha": 1.0, "beta": 0.1},
    {"alpha": 0.7, "beta": 0.3, "label_smoothing": 0.2, "nll_weight": 0.5},
    {"alpha": 1.2, "beta": 0.3, "loss_type": "hinge", "label_smoothing": 0.1},
    {"alpha": 0.9, "beta": 0.2, "loss_type": "ipo", "label_smoothing": 0.1, "nll_weight": 0.5},
    {"alpha": 0.6, "beta": 0.3, "alpha_level": "token", "label_smoothing": 0.1, "nll_weight": 0.5},
    {"alpha": 1.4, "beta": 0.3, "alpha_level": "token", "loss_type": "hinge"},
    {"alpha": 0.8, "beta": 0.3, "loss_type": "exo_pair", "label_smoothing": 0.1},
    {"alpha": 1.2, "beta": 0.3, "loss_type": "robust", "label_smoothing": 0.2},
    {"alpha": 0.8, "beta": 0.02, "loss_type": "discopop"},
    {"alpha": 0.8, "beta": 0.9, "loss_type": "sigmoid_norm", "label_smoothing": 0.2},
    {"alpha": 0.8, "beta": 0.3, "loss_type": "sft"},
    {"alpha": 0.8, "beta": 0.3, "loss_type": ["sigmoid", "hinge", "sft"], "loss_weights": [0.5, 2.0, 0.3]},
]
OF_SEQUENCES = [  # functions of two numbers a pair, or of all pairs
    *({"alpha": 0.8, "beta": 0.2, "loss_type": name} for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero")),
    {"alpha": 1.3, "beta": 0.2, "loss_type": "apo_down", "alpha_level": "token", "nll_weight": 0.4},
    {"alpha": 0.8, "beta": 0.2, "loss_type": "aot", "label_smoothing": 0.1},
    {"alpha": 0.8, "beta": 0.2, "loss_type": "aot_unpaired", "alpha_level": "token"},
    {"alpha": 0.8, "beta": 0.2, "loss_type": ["sigmoid", "ipo", "apo_zero", "sft"], "loss_weights": [1, 0.1, 2, 0.2]},
    {"alpha": 0.8, "beta": 0.2, "f_divergence_type": "forward_kl"},
    {"alpha": 0.8, "beta": 0.2, "f_divergence_type": "js_divergence", "loss_type": "sigmoid_norm"},
    {"alpha": 0.8, "beta": 0.2, "f_divergence_type": "alpha_divergence", "loss_type": ["hinge", "sft"]},
]


def make_pairs(dtype=torch.float64):
    torch.manual_seed(0)
    logps, ref_logps = -10 * torch.rand(2, 8, dtype=dtype)
    return logps, ref_logps, torch.tensor([3, 5, 1, 0, 7, 2, 4, 4])


@pytest.mark.parametrize("options", OPTIONS + OF_SEQUENCES, ids=str)
def test_pair_loss_matches_the_oracle(options):
    logps, ref_logps, lengths = make_pairs()
    for ref in (ref_logps, None):
        ours, oracles = logps.clone().requires_grad_(), logps.clone().requires_grad_()
        result = pair_loss(ours, ref, lengths=lengths, **options)
        expected = naive.pair_loss(oracles, ref, lengths=lengths, **options)
        assert result.entropy is result.accuracy is expected.entropy is expected.accuracy is None
        for name in set(HDPOLoss._fields) - {"entropy", "accuracy"}:
            torch.testing.assert_close(getattr(result, name), getattr(expected, name).detach(), msg=name)
        torch.testing.assert_close(
            torch.autograd.grad(result.loss, ours), torch.autograd.grad(expected.loss, oracles), rtol=1e-9, atol=1e-12
        )
        assert not any(t.requires_grad for t in result[1:] if t is not None)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sequence_coefficients_and_slope_are_the_gradient_of_the_oracle(options):
    logps, ref_logps, lengths = make_pairs()
    parsed, n = PairOptions(**options), lengths.double()
    a, k = pair.sequence_coefficients(4, n, parsed)
    c = a * pair.score(logps, ref_logps, n, parsed, 4).slope.repeat_interleave(2) + (0 if k is None else k)
    leaf = logps.clone().requires_grad_()
    (expected,) = torch.autograd.grad(naive.pair_loss(leaf, ref_logps, lengths=n, **options).loss, leaf)
    torch.testing.assert_close(c, expected, rtol=1e-9, atol=1e-12)


def test_pair_loss_is_the_equation_of_the_paper():
    logps, ref_logps, _ = make_pairs()
    alpha, beta = 0.8, 0.25
    z = beta * ((alpha * logps[0::2] - ref_logps[0::2]) - (alpha * logps[1::2] - ref_logps[1::2]))
    result = pair_loss(logps, ref_logps, alpha=alpha, beta=beta)
    torch.testing.assert_close(result.loss, -z.sigmoid().log().mean())
    torch.testing.assert_close(result.margins, z)
    torch.testing.assert_close(result.chosen_rewards, beta * (alpha * logps - ref_logps)[0::2])
    torch.testing.assert_close(result.rejected_rewards, beta * (alpha * logps - ref_logps)[1::2])


def test_pair_loss_with_alpha_one_is_dpo():
    logps, ref_logps, _ = make_pairs()
    ratio = logps - ref_logps
    expected = -F.logsigmoid(0.3 * (ratio[0::2] - ratio[1::2])).mean()
    torch.testing.assert_close(pair_loss(logps, ref_logps, alpha=1.0, beta=0.3).loss, expected)


def outcome(logps, ref_logps, lengths, **options) -> list[torch.Tensor]:
    leaf = logps.clone().requires_grad_()
    result = pair_loss(leaf, ref_logps, lengths=lengths, **options)
    return [t.detach() for t in result if t is not None] + [*torch.autograd.grad(result.loss, leaf)]


def test_pair_loss_by_token_is_the_equation():
    logps, ref_logps, lengths = make_pairs()
    alpha, beta, n = 0.6, 0.25, lengths.clamp(min=1).double()
    leaf = logps.clone().requires_grad_()
    per_token, ratio, mean_length = leaf / n, leaf - ref_logps, (n[0::2] + n[1::2]) / 2
    z = beta * (ratio[0::2] - ratio[1::2]) + (alpha - 1) * beta * mean_length * (per_token[0::2] - per_token[1::2])
    expected = -z.sigmoid().log().mean()
    actual = outcome(logps, ref_logps, lengths, alpha=alpha, beta=beta, alpha_level="token")
    torch.testing.assert_close(actual[0], expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(actual[-1], *torch.autograd.grad(expected, leaf), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(actual[-2], z.detach(), rtol=1e-12, atol=0)  # margins


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_pair_loss_by_token_is_by_sequence_to_the_bit_at_alpha_one_and_at_equal_lengths(loss_type, dtype):
    logps, ref_logps, lengths = make_pairs(dtype)
    equal = torch.tensor([3, 3, 1, 1, 0, 0, 513, 513])
    for n, alpha in ((lengths, 1.0), (equal, 0.7), (equal, 1.4)):
        options = {"alpha": alpha, "beta": 0.3, "loss_type": loss_type, "nll_weight": 0.1}
        by_token, by_sequence = (
            outcome(logps, ref_logps, n, alpha_level=level, **options) for level in ("token", "sequence")
        )
        assert all(map(torch.equal, by_token, by_sequence))


def test_pair_loss_by_token_starts_without_a_margin_where_tokens_are_equally_likely():
    lengths = torch.tensor([5, 50, 400, 3])
    logps = -1.7 * lengths.double()
    options = {"beta": 0.1, "lengths": lengths}
    for alpha in (0.5, 1.6):
        assert pair_loss(logps, logps, alpha=alpha, alpha_level="token", **options).margins.abs().max() < 1e-13
        assert pair_loss(logps, logps, alpha=alpha, **options).margins.abs().min() > 3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_initial_margins_are_those_of_a_policy_that_is_its_reference(options):
    _, ref_logps, lengths = make_pairs()
    expected = naive.pair_loss(ref_logps, ref_logps, lengths=lengths, **options).margins
    actual = pair.initial_margins(ref_logps, lengths.double(), PairOptions(**options))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pair_options_come_back_from_their_numbers(options):
    assert PairOptions.from_numbers(PairOptions(**options).numbers) == PairOptions(**options)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_pair_loss_takes_lengths_of_integers(loss_type):
    logps, ref_logps, lengths = make_pairs(torch.float32)
    options = {"alpha": 0.9, "beta": 0.3, "loss_type": loss_type, "nll_weight": 0.1}
    of_ints, of_floats = (pair_loss(logps, ref_logps, lengths=n, **options) for n in (lengths, lengths.float()))
    assert torch.equal(of_ints.loss, of_floats.loss)


def test_pair_loss_of_extreme_margins_is_finite():
    logps = torch.tensor([-1e6, 0.0, 0.0, -1e6], requires_grad=True)
    result = pair_loss(logps, None, alpha=1.0, beta=1.0)
    assert float(result.loss.detach()) == pytest.approx(5e5)
    (grad,) = torch.autograd.grad(result.loss, logps)
    assert grad.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_pair_loss_of_nothing_is_zero():
    logps = torch.zeros(0, requires_grad=True)
    for loss_type in ("sigmoid", "hinge", "ipo"):
        result = pair_loss(logps, None, alpha=1.0, beta=0.1, loss_type=loss_type, nll_weight=0.1, lengths=logps)
        assert float(result.loss.detach()) == 0 and result.margins.shape == (0,)
        assert torch.autograd.grad(result.loss, logps)[0].shape == (0,)


def test_pair_loss_of_an_empty_sequence_is_finite():
    logps, lengths = torch.tensor([0.0, -3.0]), torch.tensor([0, 2])
    for loss_type in ("sigmoid", "hinge", "ipo"):
        result = pair_loss(logps, None, alpha=0.9, beta=0.1, loss_type=loss_type, nll_weight=0.1, lengths=lengths)
        assert result.loss.isfinite()


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_pair_loss_of_nan_is_nan(loss_type):
    logps = torch.tensor([-1.0, torch.nan, -1.0, -2.0])
    result = pair_loss(logps, None, alpha=1.0, beta=0.1, loss_type=loss_type, lengths=torch.ones(4))
    assert result.loss.isnan() and result.margins.isnan().tolist() == [True, False]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_gradient_unit_brings_coefficients_to_about_one(loss_type):
    options = PairOptions(alpha=0.9, beta=1e-3, loss_type=loss_type)
    unit = options.gradient_unit(range(8193))
    a, _ = pair.sequence_coefficients(4096, torch.ones(8192), options)
    assert 0.5 < float(a.abs().max()) * unit < 2 and math.log2(unit).is_integer()
    assert options.gradient_unit([0]) > 0


def test_gradient_unit_keeps_the_coefficients_of_unequal_pairs_in_the_range_of_fp16():
    options = PairOptions(alpha=1.4, beta=0.1, alpha_level="token")
    bounds = [0, 100, 200, 201, 4201]
    a, _ = pair.sequence_coefficients(2, torch.tensor(bounds).diff().double(), options)
    scaled = a.abs() * options.gradient_unit(bounds)
    assert float(scaled.min()) > 0.01 and float(scaled.max()) < 128 < float(a[2] / a[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be a positive number, got 0.0"),
        ({"alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ({"beta": -0.1}, "beta must be a positive number, got -0.1"),
        ({"beta": float("inf")}, "beta must be a positive number, got inf"),
        ({"loss_type": "dpop"}, "one of sigmoid, hinge, ipo, exo_pair, .*; got 'dpop'"),
        ({"label_smoothing": 0.5}, r"in \[0, 0.5\); got 0.5"),
        ({"label_smoothing": -0.1}, r"in \[0, 0.5\); got -0.1"),
        ({"nll_weight": -1.0}, "nll_weight must be zero or positive, got -1.0"),
        ({"alpha_level": "word"}, "alpha_level must be one of sequence, token; got 'word'"),
        ({"alpha_level": "token", "loss_type": "ipo"}, "by token already: leave out alpha_level='token'"),
        ({"loss_type": "ipo"}, "alpha_level='token' need lengths"),
        ({"nll_weight": 0.1}, "alpha_level='token' need lengths"),
        ({"alpha_level": "token"}, "alpha_level='token' need lengths"),
        ({"lengths": torch.ones(4)}, r"lengths must have one entry a sequence, \(2,\), got \(4,\)"),
    ],
)
def test_pair_loss_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        pair_loss(torch.zeros(2), None, **{"alpha": 1.0, "beta": 0.1, **options})


def test_pair_loss_refuses_an_odd_number_of_sequences():
    with pytest.raises(ValueError, match=r"S even .*got \(3,\)"):
        pair_loss(torch.zeros(3), None, alpha=1.0, beta=0.1)


@pytest.mark.parametrize(
    ("ref_logps", "message"),
    [
        (torch.zeros(1), r"one entry a sequence, \(2,\).*got torch.float32 \(1,\)"),
        (torch.zeros(2, dtype=torch.int64), "must be floating.*got torch.int64"),
        (torch.zeros(2, device="meta"), "ref_logps are on meta but the rest is on cpu"),
        (torch.zeros(2, requires_grad=True), "the reference is frozen: detach them"),
    ],
)
def test_pair_loss_refuses_ref_logps_that_do_not_fit(ref_logps, message):
    with pytest.raises(ValueError, match=message):
        pair_loss(torch.zeros(2), ref_logps, alpha=1.0, beta=0.1)
