"""The fused forward against the oracle: logp and entropy of hidden @ weight.T without the logits."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hdpo_kernels import fused, linear_hdpo_loss, linear_logp, naive
from hdpo_kernels.gemm import mm_into
from hdpo_kernels.lm_head import fused_forward
from hdpo_kernels.testing import Operations, assert_as_accurate_as, zipf_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_V = 256  # the widest tile


def make_inputs(n: int, vocab: int, hidden_size: int, dtype=torch.float32, **options) -> tuple[Tensor, Tensor, Tensor]:
    inputs = zipf_inputs([n], vocab, hidden_size, dtype=dtype, device=DEVICE, **options)
    labels = inputs.labels
    if n > 1:
        labels[0], labels[-1] = vocab - 1, 0
    return inputs.hidden, inputs.weight, labels


def oracle(logits: Tensor, labels: Tensor, bias=None, softcap=None, logit_scale=1.0) -> tuple[Tensor, ...]:
    """The three statistics by the specification, in the logits' dtype."""
    logits = logits if bias is None else logits + bias.to(logits.dtype)
    return naive._token_logp(logits, labels, softcap, logit_scale)


def check_linear_stats(hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> None:
    """Not less accurate than the path through logits that it replaces."""
    stats = fused.linear_stats(hidden, weight, labels, **options)
    exact = hidden.double() @ weight.double().T
    logits = torch.empty_like(exact, dtype=torch.float32)
    mm_into(logits, hidden, weight.T)
    scale = float(exact.abs().max()) + 1  # what a log-probability is a difference of
    for name, *values in zip(
        stats._fields, stats, oracle(logits, labels, **options), oracle(exact, labels, **options), strict=True
    ):
        assert_as_accurate_as(*values, scale=scale, name=name)


@pytest.mark.parametrize(
    ("n", "vocab", "hidden_size"),
    [(1, 1, 96), (6, 2, 1), (1, 257, 96), (5, BLOCK_V, 64), (130, 300, 40), (257, 513, 100), (3, 32003, 24)],
)
def test_linear_stats_match_the_oracle_at_ragged_sizes(n, vocab, hidden_size):
    check_linear_stats(*make_inputs(n, vocab, hidden_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_stats_match_the_oracle_with_bias_softcap_and_scale(dtype):
    inputs = make_inputs(5, 300, 96, dtype, masked=0.3)
    bias = torch.randn(300, device=DEVICE).to(dtype)
    check_linear_stats(*inputs, bias=bias, softcap=3.0, logit_scale=0.7)
    check_linear_stats(*inputs, bias=bias)
    check_linear_stats(*inputs, softcap=30.0)
    check_linear_stats(*inputs, logit_scale=-0.7)


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 16])
def test_linear_stats_match_the_oracle_in_any_number_of_splits(splits, monkeypatch):
    monkeypatch.setattr(fused, "choose_splits", lambda *_: splits)
    hidden, weight, labels = make_inputs(7, 4 * BLOCK_V + 3, 96, masked=0.3)
    bias = torch.zeros(len(weight), device=DEVICE)
    check_linear_stats(hidden, weight, labels, bias=bias)
    bias[: 2 * BLOCK_V + 5] = -torch.inf  # whole splits without an entry that counts
    check_linear_stats(hidden, weight, labels, bias=bias)


def test_linear_stats_of_no_rows_are_empty():
    hidden, weight, labels = make_inputs(1, 300, 96)
    assert [t.shape for t in fused.linear_stats(hidden[:0], weight, labels[:0])] == [(0,)] * 3


def test_linear_stats_of_entries_switched_off_are_those_of_the_others():
    hidden, weight, _ = make_inputs(4, 700, 96)
    labels = torch.tensor([699, BLOCK_V + 3, 5, -100], device=DEVICE)  # 5 is off: its log-probability is −inf
    bias = torch.zeros(700, device=DEVICE)
    bias[: BLOCK_V + 3] = -torch.inf
    check_linear_stats(hidden, weight, labels, bias=bias)
    bias[:] = -torch.inf
    check_linear_stats(hidden, weight, labels, bias=bias)
    bias[7] = 0.0
    stats = fused.linear_stats(hidden, weight, torch.full_like(labels, 7), bias=bias)
    assert (stats.logp == 0).all() and (stats.entropy == 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_linear_stats_of_huge_logits_are_finite(offset):
    hidden, weight, labels = make_inputs(5, 300, 96)
    hidden *= 1e4 / float((hidden @ weight.T).abs().max())
    check_linear_stats(hidden, weight, labels, bias=torch.full((300,), offset, device=DEVICE))
    check_linear_stats(hidden, weight, labels, softcap=30.0)


def test_linear_stats_rows_that_are_not_scored_are_zero_whatever_they_hold():
    hidden, weight, labels = make_inputs(5, 300, 96)
    hidden[1], hidden[2, 3] = torch.nan, torch.inf
    stats = fused.linear_stats(hidden, weight, torch.full_like(labels, -100))
    assert all((t == 0).all() for t in stats)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_linear_stats_is_top1_is_that_of_the_oracle_with_ties(splits, monkeypatch):
    monkeypatch.setattr(fused, "choose_splits", lambda *_: splits)
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-1, 2, (n, 16), generator=rng).float().to(DEVICE) for n in (70, 1200))
    logits = hidden @ weight.T  # small integers: exact, and with many ties
    labels = logits.argmax(1)
    labels[::2] = (logits == logits.amax(1, keepdim=True)).float().cumsum(1).argmax(1)[::2]  # the last of the likeliest
    labels[::3], labels[5] = torch.randint(1200, (24,), generator=rng).to(DEVICE), -100
    expected = oracle(logits, labels)[2]
    assert torch.equal(fused.linear_stats(hidden, weight, labels).is_top1, expected)
    assert 0 < expected.sum() < 70 and (logits == logits.amax(1, keepdim=True)).sum() > 100


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_linear_stats_of_a_row_with_nan_or_inf_are_nan_and_no_others(value):
    hidden, weight, labels = make_inputs(130, 300, 96)
    weight[7, 95] = 1.0  # one logit +inf, others −inf
    clean = fused.linear_stats(hidden, weight, labels)
    bad = torch.zeros(130, dtype=torch.bool, device=DEVICE)
    bad[[1, 129]] = True
    hidden[1, 95], hidden[129] = value, value
    stats = fused.linear_stats(hidden, weight, labels)
    for before, after in zip(clean, stats, strict=True):
        assert torch.equal(after.isnan(), bad & (after is not stats.is_top1)) and torch.equal(after[~bad], before[~bad])
    assert (stats.is_top1[bad] == 0).all()


def test_linear_stats_of_a_weight_with_nan_are_nan():
    hidden, weight, labels = make_inputs(3, 700, 96)
    weight[300, 5] = torch.nan
    stats = fused.linear_stats(hidden, weight, labels)
    assert stats.logp.isnan().all() and stats.entropy.isnan().all() and (stats.is_top1 == 0).all()


def test_linear_stats_of_a_label_outside_the_vocabulary_have_a_nan_logp():
    hidden, weight, _ = make_inputs(7, 300, 96)
    labels = torch.tensor([0, 300, 301, -1, -99, 2**40, 299], device=DEVICE)
    stats = fused.linear_stats(hidden, weight, labels)
    assert stats.logp.isnan().tolist() == [False, *[True] * 5, False]
    assert stats.entropy.isfinite().all()


def test_linear_stats_read_tensors_that_are_not_contiguous():
    hidden, weight, labels = make_inputs(6, 300, 96)
    bias = torch.randn(300, device=DEVICE)
    expected = fused.linear_stats(hidden, weight, labels, bias=bias)

    def surrounded(t: Tensor) -> Tensor:
        """The same numbers with NaN between the rows."""
        wide = torch.full((t.shape[0], t.shape[1] + 13), torch.nan, device=DEVICE)
        wide[:, 7:-6] = t
        return wide[:, 7:-6]

    apart = surrounded(hidden), surrounded(weight), labels.repeat_interleave(2)[::2]
    columns = hidden.T.contiguous().T, weight.T.contiguous().T, labels
    for inputs in (apart, columns):
        stats = fused.linear_stats(*inputs, bias=bias.repeat_interleave(3)[::3])
        torch.testing.assert_close(tuple(stats), tuple(expected))


def test_linear_stats_address_more_than_2_to_the_31_numbers(tmp_path):
    """Three rows 2³⁰ + 16 numbers apart, in a sparse file: a 32-bit offset of the last would be 32 − 2³¹."""
    stride = 2**30 + 16
    inputs = make_inputs(3, 3, 96, torch.float16)
    expected = fused.linear_stats(*inputs)
    size = 2**31 + 2 * stride + 96
    for i in range(2):
        if DEVICE == "cpu":
            base = torch.from_file(str(tmp_path / f"sparse{i}"), shared=True, size=size, dtype=torch.float16)
        else:
            base = torch.zeros(size, dtype=torch.float16, device=DEVICE)
        apart = base[2**31 :].as_strided((3, 96), (stride, 1))
        apart.copy_(inputs[i])
        stats = fused.linear_stats(*inputs[:i], apart, *inputs[i + 1 :])
        torch.testing.assert_close(tuple(stats), tuple(expected))


def test_linear_stats_have_the_same_bits_twice():
    inputs = make_inputs(130, 1000, 96, torch.bfloat16, masked=0.3)
    assert all(map(torch.equal, fused.linear_stats(*inputs), fused.linear_stats(*inputs)))


@pytest.mark.parametrize("num_sms", [1, 20, 108, 132])
def test_choose_splits_keeps_every_multiprocessor_busy(num_sms):
    for row_blocks in (1, 2, 7, 64, 133, 1000):
        for tiles in (1, 126, 501, 594):
            splits = fused.choose_splits(row_blocks, tiles, num_sms)
            assert 1 <= splits <= tiles
            longest = -(-row_blocks * splits // num_sms) * -(-tiles // splits)
            shortest = max(row_blocks * tiles / num_sms, 1)
            assert longest <= 1.2 * shortest + 1


@pytest.mark.gpu
def test_linear_stats_at_a_real_size_are_as_accurate_as_torch():
    n, vocab, hidden_size, rows = 8192, 128256, 896, 512
    hidden, weight, labels = make_inputs(n, vocab, hidden_size, torch.bfloat16, masked=0.1)
    stats = fused.linear_stats(hidden, weight, labels)
    assert all(map(torch.equal, stats, fused.linear_stats(hidden, weight, labels)))
    exact_weight, logits = weight.double(), torch.empty(rows, vocab, device=DEVICE)
    baseline, truth = [], []
    for part in (slice(start, start + rows) for start in range(0, n, rows)):
        mm_into(logits, hidden[part], weight.T)
        baseline.append(oracle(logits, labels[part]))
        truth.append(oracle(hidden[part].double() @ exact_weight.T, labels[part]))
    for i, name in enumerate(stats._fields):
        low, exact = (torch.cat([part[i] for part in parts]) for parts in (baseline, truth))
        assert_as_accurate_as(stats[i], low, exact, scale=float(exact.abs().max()), name=name)


@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_functions_without_gradient_use_the_fused_forward_where_told(masked, monkeypatch):
    inputs = zipf_inputs([9, 4, 5, 12], 257, 24, device=DEVICE, masked=masked)
    options = {"bias": torch.randn(257, device=DEVICE), "softcap": 20.0, "logit_scale": 0.7}
    expected = linear_logp(*inputs[:3], **options), linear_hdpo_loss(*inputs, **options)
    calls = []

    def forward(hidden, weight):
        calls.append(hidden.shape)
        return fused.linear_stats

    monkeypatch.setattr("hdpo_kernels.lm_head.fused_forward", forward)
    with Operations() as operations:
        actual = linear_logp(*inputs[:3], **options), linear_hdpo_loss(*inputs, **options)
    assert len(calls) == 2 and operations.gemm_flops == 0
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    linear_hdpo_loss(inputs.hidden.requires_grad_(), *inputs[1:], **options).loss.backward()
    assert len(calls) == 2, "with a gradient logits are needed"


def test_fused_forward_is_for_small_hidden_sizes_on_cuda():
    def chosen(hidden_size, stride):
        rows = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 2, shape=(5, hidden_size))
        rows.stride = lambda _: stride
        return fused_forward(rows, rows) is fused.linear_stats

    assert chosen(896, 896) and chosen(1024, 2048)
    assert not chosen(1040, 1040) and not chosen(888, 888) and not chosen(896, 900)
    cpu = torch.zeros(5, 16, dtype=torch.bfloat16)
    assert fused_forward(cpu, cpu) is None
