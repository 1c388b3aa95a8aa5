"""Row operations, torch's and Triton's, against the oracle: statistics of a row of logits and their gradient."""

import importlib
import math

import pytest
import torch
from torch import Tensor

from hdpo_kernels import naive
from hdpo_kernels.testing import assert_as_accurate_as, zipf_inputs

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_V = 2048  # the Triton kernels' tile


@pytest.fixture(params=["torch", "triton", "triton, rows too long for a program"])
def rows(request, monkeypatch):
    """Triton's statistics and gradient of a row are one kernel where the row fits a program, otherwise two."""
    module = importlib.import_module(f"hdpo_kernels.rows.{request.param.split(',')[0]}")
    if "," in request.param:
        monkeypatch.setattr(module, "WHOLE_ROW", 0)
    return module


@pytest.fixture
def device(rows) -> str:
    return TRITON_DEVICE if rows.__name__.endswith("triton") else "cpu"


def make_logits(n: int, vocab: int, device: str, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(n)
    labels = torch.randint(vocab, (n,), device=device)
    labels[0], labels[-1] = vocab - 1, 0
    return (4 * torch.randn(n, vocab, device=device)).to(dtype), labels


def oracle(logits: Tensor, labels: Tensor, dtype: torch.dtype, bias=None, softcap=None, logit_scale=1.0):
    """logp, entropy, is_top1 and ∂logp/∂logits by the specification, in dtype."""
    z = logits.detach().to(dtype).requires_grad_()
    token = naive._token_logp(z if bias is None else z + bias.to(dtype), labels, softcap, logit_scale)
    (grad,) = torch.autograd.grad(token.logp.sum(), z)
    return token.logp.detach(), token.entropy.detach(), token.is_top1, grad


def check_row_stats(rows, logits, labels, *, grad_dtype=torch.float32, **options) -> None:
    truth, baseline = (oracle(logits, labels, dtype, **options) for dtype in (torch.float64, torch.float32))
    grad = torch.full_like(logits, torch.nan, dtype=grad_dtype)
    stats = rows.row_stats(logits.clone(), labels, grad_out=grad, **options)
    scale = float(logits[logits.isfinite()].abs().max()) + 1  # what a log-probability is a difference of
    for name, actual, low, exact, size in zip(
        (*stats._fields, "gradient"), (*stats, grad), baseline, truth, (scale, scale, 0.0, 1.0), strict=True
    ):
        assert_as_accurate_as(actual, low, exact, scale=size, name=name)


@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (6, 2), (3, 96), (2, BLOCK_V), (2, BLOCK_V + 1), (2, 32003)])
def test_row_stats_match_the_oracle_at_ragged_sizes(rows, device, n, vocab):
    check_row_stats(rows, *make_logits(n, vocab, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_stats_match_the_oracle_with_bias_softcap_and_scale(rows, device, dtype):
    logits, labels = make_logits(5, 97, device, dtype)
    labels[2] = -100
    bias = torch.randn(97, device=device).to(dtype)
    check_row_stats(rows, logits, labels, bias=bias, softcap=3.0, logit_scale=0.7, grad_dtype=dtype)
    check_row_stats(rows, logits, labels, bias=bias, grad_dtype=dtype)
    check_row_stats(rows, logits, labels, softcap=3.0, grad_dtype=dtype)
    check_row_stats(rows, logits, labels, logit_scale=-0.7, grad_dtype=dtype)


def test_row_stats_of_equal_logits_are_log_vocab(rows, device):
    stats = rows.row_stats(torch.full((2, 32003), 7.0, device=device), torch.tensor([0, 32002], device=device))
    log_vocab = math.log(32003)
    for actual, expected in zip(stats, (-log_vocab, log_vocab, 1.0), strict=True):
        assert actual.tolist() == pytest.approx([expected] * 2, rel=1e-6)


def test_row_stats_do_not_lose_digits_to_an_offset_of_all_logits(rows, device):
    logits, labels = make_logits(5, 97, device)
    logits = (logits * 256).round() / 256  # so that the sum is exact
    grads = [torch.empty_like(logits) for _ in range(2)]
    plain, offset = (rows.row_stats(x, labels, grad_out=g) for x, g in zip((logits, logits + 4096), grads, strict=True))
    for x, y in ((plain.logp, offset.logp), (plain.entropy, offset.entropy), grads):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_row_stats_gradient_may_overwrite_the_logits(rows, device):
    logits, labels = make_logits(5, 97, device)
    expected = oracle(logits, labels, torch.float64)[-1]
    rows.row_stats(logits, labels, grad_out=logits)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("with_grad", [True, False])
def test_row_stats_leave_the_logits_alone_without_overwrite(rows, device, with_grad):
    logits, labels = make_logits(5, 97, device)
    before = logits.clone()
    grad = torch.empty_like(logits) if with_grad else None
    rows.row_stats(logits, labels, grad_out=grad, softcap=3.0, logit_scale=0.7, overwrite=False)
    assert torch.equal(logits, before)


def test_row_stats_read_and_write_rows_that_lie_apart(rows, device):
    wide, labels = make_logits(4, 200, device)
    labels %= 97
    logits, wide_grad = wide[:, 50:147], torch.full_like(wide, 5.0)
    rows.row_stats(logits, labels, grad_out=wide_grad[:, 50:147], overwrite=False)
    expected = oracle(logits, labels, torch.float64)[-1]
    torch.testing.assert_close(wide_grad[:, 50:147].double(), expected, rtol=0, atol=1e-6)
    assert (wide_grad[:, :50] == 5).all() and (wide_grad[:, 147:] == 5).all()


def test_row_stats_rows_that_are_not_scored_are_zero_whatever_they_hold(rows, device):
    logits, labels = make_logits(4, 97, device)
    logits[1], logits[2, 3] = torch.nan, torch.inf
    labels[1:3] = -100
    grad = torch.empty_like(logits)
    stats = rows.row_stats(logits.clone(), labels, grad_out=grad)
    for tensor in (*stats, grad):
        assert (tensor[1:3] == 0).all()
    torch.testing.assert_close(
        grad[0].double(), oracle(logits[:1], labels[:1], torch.float64)[-1][0], rtol=0, atol=1e-6
    )


def test_row_stats_of_huge_logits_are_finite(rows, device):
    logits, labels = make_logits(4, 97, device)
    logits *= 1e4
    check_row_stats(rows, logits, labels)
    check_row_stats(rows, logits, labels, softcap=30.0)


def test_row_stats_of_entries_switched_off_are_those_of_the_others(rows, device):
    # A whole first tile of −inf, and a label that is off: log-probability −inf, the entropy that of the rest.
    vocab = BLOCK_V + 100
    logits, labels = make_logits(3, vocab, device)
    logits[:, : BLOCK_V + 3] = -torch.inf
    labels[:] = torch.tensor([vocab - 1, BLOCK_V + 3, 5])
    check_row_stats(rows, logits, labels)
    bias = torch.zeros(vocab, device=device)
    bias[BLOCK_V:] = -torch.inf
    check_row_stats(rows, make_logits(3, vocab, device)[0], labels.clamp(max=BLOCK_V - 1), bias=bias)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_row_stats_of_a_row_with_nan_or_inf_are_nan(rows, device, value):
    logits, labels = make_logits(3, BLOCK_V + 100, device)
    logits[1, 7] = value
    grad = torch.empty_like(logits)
    stats = rows.row_stats(logits, labels, grad_out=grad)
    for tensor in (stats.logp, stats.entropy, grad[:, 9]):
        assert tensor.isnan().tolist() == [False, True, False]
    labels[1] = 7  # the bad logit itself: no likeliest token
    assert rows.row_stats(logits, labels).is_top1[1] == 0


def test_row_stats_of_a_label_outside_the_vocabulary_are_nan(rows, device):
    logits, _ = make_logits(7, 97, device)
    labels = torch.tensor([0, 97, 98, -1, -99, 2**40, 96], device=device)
    expected = oracle(logits[::6], labels[::6], torch.float64)[-1]
    grad = torch.empty_like(logits)
    stats = rows.row_stats(logits, labels, grad_out=grad)
    assert stats.logp.isnan().tolist() == [False, *[True] * 5, False] and (stats.is_top1[1:6] == 0).all()
    torch.testing.assert_close(grad[::6].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("vocab", [5, BLOCK_V + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"logit_scale": -0.3}, {"softcap": 3.0, "logit_scale": 0.7}])
def test_row_stats_is_top1_is_that_of_the_oracle_with_ties(rows, device, vocab, dtype, options):
    n = 16
    logits = torch.randint(-2, 3, (n, vocab), generator=torch.Generator().manual_seed(vocab)).to(device, dtype)
    labels = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(1)).to(device)
    labels[5] = -100
    logits[0], labels[0] = 0.0, vocab - 1  # all equal: the last is as likely as the first
    logits[1, vocab - 1], labels[1] = logits[1].max(), vocab - 1
    head = {**options, "bias": (torch.arange(vocab, device=device) % 3).to(dtype) / 2}
    for given, grad in ((options, None), (head, torch.empty_like(logits))):
        seen = given.get("logit_scale", 1.0) * (logits.float() + given.get("bias", 0.0))
        labels[2:4] = seen[2:4].argmax(1)
        expected = oracle(logits, labels, torch.float32, **given)[2]
        assert torch.equal(rows.row_stats(logits.clone(), labels, grad_out=grad, **given).is_top1, expected)
        assert expected[5] == 0 and 0 < expected.sum() < n


def test_row_stats_gradient_has_no_denormal_numbers():
    from hdpo_kernels.rows import torch as torch_rows

    logits = torch.linspace(-120, 0, 1000).unsqueeze(0)
    grad = torch.empty_like(logits)
    torch_rows.row_stats(logits, torch.tensor([999]), grad_out=grad)
    assert ((grad == 0) | (grad.abs() > torch.finfo(torch.float32).tiny)).all() and (grad == 0).any()


def test_row_stats_address_more_than_2_to_the_31_numbers(tmp_path):
    """Three rows 2³⁰ + 16 numbers apart, in a sparse file: a 32-bit offset of the last would be 32 − 2³¹."""
    from hdpo_kernels.rows import triton as triton_rows

    stride, vocab = 2**30 + 16, 96
    logits, labels = make_logits(3, vocab, TRITON_DEVICE, torch.float16)
    grad = torch.empty(3, vocab, device=TRITON_DEVICE)
    expected = triton_rows.row_stats(logits, labels, grad_out=grad)
    size = 2**31 + 2 * stride + vocab
    if TRITON_DEVICE == "cpu":
        base = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    else:
        base = torch.zeros(size, dtype=torch.float16, device=TRITON_DEVICE)
    apart = base[2**31 :].as_strided((3, vocab), (stride, 1))
    apart.copy_(logits)
    stats = triton_rows.row_stats(apart, labels, grad_out=apart)
    torch.testing.assert_close(tuple(stats), tuple(expected))
    torch.testing.assert_close(apart.float(), grad, rtol=0, atol=1e-3)


def test_sequence_sum_matches_the_oracle(rows, device):
    values = torch.randn(3000, device=device)
    cu_seqlens = [0, 0, 1, 1500, 1500, 1503, 3000]
    actual = rows.sequence_sum(values, cu_seqlens)
    truth, baseline = (naive.sequence_sum(values.to(dtype), cu_seqlens) for dtype in (torch.float64, torch.float32))
    assert_as_accurate_as(actual, baseline, truth)
    assert actual[[0, 3]].tolist() == [0, 0]
    assert rows.sequence_sum(values[:0], [0]).shape == (0,)
    assert rows.sequence_sum(values[:0], [0, 0, 0]).tolist() == [0, 0]


def test_sequence_sum_of_two_times_64k_tokens_keeps_its_digits(rows, device):
    n = 65536
    values = -(torch.rand(2 * n, generator=torch.Generator().manual_seed(0)) + 1).to(device)
    actual = rows.sequence_sum(values, [0, n, 2 * n])
    truth = values.double().view(2, n).sum(1)
    assert ((actual - truth) / truth).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_row_stats_do_not_lose_digits_over_a_large_vocabulary(rows, device):
    """A plain fp32 sum of 32,000 probabilities is off by 1e-5, in one direction: 0.02 nat over 2,048 tokens."""
    inputs = zipf_inputs([32], 32003, 64, sharpness=2.0, device=device)
    logits, labels = inputs.hidden @ inputs.weight.T, inputs.labels
    logp, entropy, _, d_logits = oracle(logits, labels, torch.float64)
    grad = torch.empty_like(logits)
    stats = rows.row_stats(logits.clone(), labels, grad_out=grad)
    assert (stats.logp - logp).abs().max() < 2e-6
    assert (stats.entropy - entropy).abs().max() < 2e-6
    assert (grad - d_logits).sum(1).abs().max() < 2e-6


@pytest.mark.parametrize(("vocab", "options"), [(32768, {}), (16384, {"softcap": 3.0}), (16384, {"bias": True})])
def test_rows_are_read_once_while_they_fit_a_program(monkeypatch, vocab, options):
    from hdpo_kernels.rows import triton as triton_rows

    logits, labels = make_logits(1, vocab + 1, TRITON_DEVICE)
    options = {name: torch.zeros(vocab, device=TRITON_DEVICE) if name == "bias" else x for name, x in options.items()}
    grad = torch.empty_like(logits)
    monkeypatch.setattr(triton_rows, "_row_grad_kernel", None)  # which reads a row again
    triton_rows.row_stats(logits[:, :vocab], labels % vocab, grad_out=grad[:, :vocab], **options)
    with pytest.raises(TypeError, match="not subscriptable"):
        triton_rows.row_stats(logits, labels, grad_out=grad, softcap=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_rows_multiplies_rows_and_leaves_those_that_are_not_scored_zero(rows, device, dtype):
    x = torch.randn(4, 1500, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x[1], scale = torch.nan, torch.tensor([2.0, 3.0, torch.nan, 0.3], device=device)
    labels = torch.tensor([0, -100, -100, 5], device=device)
    expected = torch.zeros(4, 1500)
    expected[0], expected[3] = x[0].cpu().float() * 0.5, x[3].cpu().float() * 0.3 * 0.25
    for factor in (0.25, torch.tensor(0.25, device=device)):
        actual = rows.scale_rows(x, scale, factor=factor, labels=labels)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.cpu().float(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    wide = rows.scale_rows(x[:, ::3], scale[:1].expand(4), labels=labels, dtype=torch.float32)
    torch.testing.assert_close(wide.cpu()[0], 2 * x[0, ::3].cpu().float())
    data = x.data_ptr()
    assert rows.scale_rows(x, scale, dtype=dtype, inplace=True).data_ptr() == data
    assert rows.scale_rows(x[:0], scale[:0]).shape == (0, 1500)


def test_times_is_in_place_where_the_dtype_is_kept(rows, device):
    acc = torch.randn(70, 50, generator=torch.Generator().manual_seed(0)).to(device)
    before = acc.clone()
    for factor in (1.0, -3.0):
        low = rows.times(acc, torch.tensor(factor, device=device), torch.bfloat16)
        torch.testing.assert_close(low, (before * factor).bfloat16(), rtol=2**-7, atol=0)
        assert torch.equal(acc, before)
    assert rows.times(acc, torch.tensor(1.0, device=device), torch.float32) is acc and torch.equal(acc, before)
    assert rows.times(acc, torch.tensor(-3.0, device=device), torch.float32) is acc and torch.equal(acc, -3 * before)
