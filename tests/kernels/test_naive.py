"""The oracle against gradcheck, closed forms and the identities of H-DPO."""

import math

import pytest
import torch
import torch.nn.functional as F

from hdpo_kernels import naive
from hdpo_kernels.testing import true_outcome, zipf_inputs

LENGTHS = [3, 5, 0, 2]
CU_SEQLENS = [0, 3, 8, 8, 10]


def small_inputs(masked: float = 0.2):
    return zipf_inputs(LENGTHS, 7, 4, masked=masked, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.8, "beta": 0.3},
        {"alpha": 1.3, "label_smoothing": 0.1, "softcap": 2.0, "logit_scale": 0.5},
        {"loss_type": "hinge", "beta": 0.05},
        {"loss_type": "ipo", "label_smoothing": 0.2},
        {"nll_weight": 0.7},
        {"alpha": 0.6, "alpha_level": "token", "nll_weight": 0.2},
    ],
    ids=str,
)
def test_linear_hdpo_loss_passes_gradcheck(options):
    inputs = small_inputs()
    bias = torch.randn(7, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.weight, bias)]

    def loss(hidden, weight, bias):
        return naive.linear_hdpo_loss(hidden, weight, *inputs[2:], bias=bias, **options).loss

    torch.autograd.gradcheck(loss, leaves)


def test_linear_logp_of_equal_logits_is_minus_log_vocab():
    hidden, weight = torch.randn(3, 4, dtype=torch.float64), torch.ones(11, 4, dtype=torch.float64)
    token = naive.linear_logp(hidden, weight, torch.tensor([0, 10, -100]))
    expected = torch.tensor([math.log(11), math.log(11), 0], dtype=torch.float64)
    torch.testing.assert_close(token.logp, -expected)
    torch.testing.assert_close(token.entropy, expected)


def test_linear_logp_is_top1_where_no_logit_is_larger():
    logits = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [5.0, torch.nan, 1.0], [9.0, 1.0, 1.0]])
    token = naive.linear_logp(logits, torch.eye(3), torch.tensor([1, 2, 0, 0, -100]))
    assert token.is_top1.tolist() == [1, 1, 0, 0, 0]


def test_hdpo_loss_accuracy_is_of_scored_tokens():
    labels = torch.tensor([0, 1, -100, 0, -100])
    logits = torch.tensor([[1.0, 0.0]]).expand(5, 2)
    assert naive.hdpo_loss(logits, labels, [0, 4, 5], None).accuracy.tolist() == pytest.approx([2 / 3, 0])


def test_linear_logp_of_two_logits_is_logsigmoid():
    hidden = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    weight = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)
    token = naive.linear_logp(hidden, weight, torch.tensor([0, 1]), logit_scale=2.0)
    margin = 2.0 * hidden.squeeze(1)
    torch.testing.assert_close(token.logp, torch.stack([F.logsigmoid(margin[0]), F.logsigmoid(-margin[1])]))
    p = margin.sigmoid()
    torch.testing.assert_close(token.entropy, -(p * p.log() + (1 - p) * (1 - p).log()))


def test_linear_logp_transforms_logits_by_bias_then_scale_then_softcap():
    inputs = small_inputs(masked=0.0)
    bias = torch.randn(7, dtype=torch.float64)
    logits = 3.0 * torch.tanh(0.5 * (inputs.hidden @ inputs.weight.T + bias) / 3.0)
    expected = logits.softmax(1).log()[range(10), inputs.labels]
    token = naive.linear_logp(*inputs[:3], bias=bias, softcap=3.0, logit_scale=0.5)
    torch.testing.assert_close(token.logp, expected)


def test_linear_logp_softcap_bounds_logits():
    # Logits ±1e4 are capped to ±2: log-probability −log(1 + e⁻⁴), in closed form.
    hidden, weight = torch.tensor([[1e4]], dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    token = naive.linear_logp(hidden, weight, torch.tensor([0]), softcap=2.0)
    assert float(token.logp) == pytest.approx(-math.log1p(math.exp(-4)))


def test_linear_logp_entropy_survives_a_bias_of_minus_infinity():
    bias = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64)
    zeros = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    token = naive.linear_logp(*zeros, torch.tensor([1]), bias=bias)
    assert float(token.logp) == pytest.approx(-math.log(2))
    assert float(token.entropy) == pytest.approx(math.log(2))


def test_linear_logp_computes_the_softmax_of_bf16_logits_in_fp32():
    inputs = zipf_inputs([64], 97, 16, dtype=torch.bfloat16)
    token = naive.linear_logp(*inputs[:3])
    assert token.logp.dtype == token.entropy.dtype == torch.float32
    assert token.logp.unique().numel() > 60  # bf16 has too few digits to keep 64 log-probabilities apart


def test_sequence_sum_adds_within_boundaries():
    values = torch.arange(1.0, 11.0)
    assert naive.sequence_sum(values, CU_SEQLENS).tolist() == [6, 30, 0, 19]
    assert naive.sequence_sum(values, torch.tensor([0, 10])).tolist() == [55]
    assert naive.sequence_sum(values[:0], [0]).shape == (0,)


def test_hdpo_loss_with_alpha_one_is_dpo():
    inputs = small_inputs()
    result = naive.linear_hdpo_loss(*inputs, alpha=1.0, beta=0.3)
    ratio = result.logps - inputs.ref_logps
    dpo = -F.logsigmoid(0.3 * (ratio[0::2] - ratio[1::2])).mean()
    torch.testing.assert_close(result.loss, dpo)


def test_hdpo_loss_is_dpo_with_scaled_beta_and_reference():
    inputs, alpha, beta = small_inputs(), 0.7, 0.4
    hdpo = naive.linear_hdpo_loss(*inputs, alpha=alpha, beta=beta)
    dpo = naive.linear_hdpo_loss(*inputs[:4], inputs.ref_logps / alpha, alpha=1.0, beta=alpha * beta)
    torch.testing.assert_close(hdpo.loss, dpo.loss)
    torch.testing.assert_close(hdpo.chosen_rewards, dpo.chosen_rewards)


def test_hdpo_loss_initial_margin_is_alpha_minus_one_times_the_reference_margin():
    inputs, alpha, beta = small_inputs(), 0.7, 0.4
    logps = naive.linear_hdpo_loss(*inputs).logps
    initial = naive.linear_hdpo_loss(*inputs[:4], logps, alpha=alpha, beta=beta)
    expected = (alpha - 1) * beta * (logps[0::2] - logps[1::2])
    torch.testing.assert_close(initial.margins, expected)
    torch.testing.assert_close(initial.loss, -F.logsigmoid(expected).mean())
    assert float(naive.linear_hdpo_loss(*inputs[:4], logps, alpha=1.0).loss) == pytest.approx(math.log(2))


def test_hdpo_loss_alone_carries_a_gradient():
    inputs = small_inputs()
    result = naive.linear_hdpo_loss(inputs.hidden.requires_grad_(), *inputs[1:])
    rewards = (result.chosen_rewards, result.rejected_rewards, result.margins)
    assert result.loss.requires_grad and not any(r.requires_grad for r in rewards)


def test_hdpo_loss_from_logits_is_the_loss_from_hidden_states():
    inputs = small_inputs()
    bias = torch.randn(7, dtype=torch.float64)
    options = {"alpha": 0.8, "softcap": 3.0, "logit_scale": 0.5, "nll_weight": 0.1}
    logits = inputs.hidden @ inputs.weight.T + bias
    from_logits = naive.hdpo_loss(logits, *inputs[2:], **options)
    from_hidden = naive.linear_hdpo_loss(*inputs, bias=bias, **options)
    for x, y in zip(from_logits, from_hidden, strict=True):
        torch.testing.assert_close(x, y)


def test_hdpo_loss_without_pairs_or_scored_rows_is_zero_or_log_two():
    inputs = small_inputs(masked=1.0)
    assert float(naive.linear_hdpo_loss(*inputs[:4], None).loss) == pytest.approx(math.log(2))
    empty = naive.linear_hdpo_loss(inputs.hidden[:0], inputs.weight, inputs.labels[:0], [0], inputs.ref_logps[:0])
    assert float(empty.loss) == 0


def test_pair_loss_ipo_and_nll_are_normalised_by_length():
    logps = torch.tensor([-6.0, -8.0], dtype=torch.float64)
    lengths = torch.tensor([3, 2])
    ipo = naive.pair_loss(logps, None, alpha=1.0, beta=0.5, loss_type="ipo", lengths=lengths)
    assert float(ipo.loss) == pytest.approx((-2.0 + 4.0 - 1.0) ** 2)
    nll = naive.pair_loss(logps, None, alpha=1.0, beta=0.5, nll_weight=0.25, lengths=lengths)
    assert float(nll.loss) == pytest.approx(math.log1p(math.exp(-1.0)) + 0.25 * 2.0)


def test_pair_loss_label_smoothing_mixes_the_loss_of_the_swapped_pair():
    logps = torch.tensor([-6.0, -8.0, -3.0, -2.5], dtype=torch.float64)
    swapped = logps[[1, 0, 3, 2]]
    lengths = torch.tensor([3, 2, 1, 1])
    for loss_type in ("sigmoid", "hinge", "ipo"):
        plain, flipped = (
            naive.pair_loss(x, None, alpha=0.9, beta=0.5, loss_type=loss_type, lengths=n).loss
            for x, n in ((logps, lengths), (swapped, lengths[[1, 0, 3, 2]]))
        )
        options = {"loss_type": loss_type, "label_smoothing": 0.2, "lengths": lengths}
        smoothed = naive.pair_loss(logps, None, alpha=0.9, beta=0.5, **options).loss
        torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * flipped)


def test_pair_loss_by_token_weighs_mean_log_probs_by_the_pairs_mean_length():
    logps, ref_logps = torch.tensor([[-6.0, -8.0], [-5.0, -9.0]], dtype=torch.float64)
    result = naive.pair_loss(
        logps, ref_logps, alpha=0.5, beta=0.1, alpha_level="token", lengths=torch.tensor([2, 8])
    )  # fmt: skip
    # β(Δ_w − Δ_l) = 0.1 · (−1 − 1), and (α − 1)βn̄ = −0.25 times −3 + 1 nats per token
    assert float(result.margins) == pytest.approx(-0.2 + 0.25 * 2)
    assert float(result.chosen_rewards) == pytest.approx(0.1 * (-0.25 * -6.0 + 5.0))  # α_w = 1 − 0.5 · 5/2


def test_pair_loss_refuses_alpha_by_token_for_ipo():
    options = {"alpha": 1.0, "beta": 0.1, "lengths": torch.ones(2), "alpha_level": "token"}
    with pytest.raises(ValueError, match="'token' without ipo"):
        naive.pair_loss(torch.zeros(2), None, loss_type="ipo", **options)


def test_pair_loss_refuses_an_unknown_loss_type():
    with pytest.raises(ValueError, match=r"one of sigmoid, hinge, ipo, .*; not 'dpop'"):
        naive.pair_loss(torch.zeros(2), None, alpha=1.0, beta=0.1, loss_type="dpop")


def test_true_outcome_in_slices_is_the_oracle():
    inputs = small_inputs()
    bias = torch.randn(7, dtype=torch.float64)
    options = {"alpha": 0.8, "beta": 0.3, "softcap": 3.0, "logit_scale": 0.5, "nll_weight": 0.1}
    sliced = true_outcome(inputs, bias=bias, slice_rows=3, **options)
    leaves = [t.requires_grad_() for t in (inputs.hidden, inputs.weight, bias)]
    result = naive.linear_hdpo_loss(*leaves[:2], *inputs[2:], bias=leaves[2], **options)
    result.loss.backward()
    for x, y in zip((*sliced.result, *sliced[1:]), (*result, *(leaf.grad for leaf in leaves)), strict=True):
        torch.testing.assert_close(x, y)
