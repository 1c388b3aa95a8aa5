"""Rounding rows of the gradient to entries: unbiased, bounded, exact where it says so, in torch and in Triton."""

import importlib
import math

import pytest
import torch
from torch import Tensor

from hdpo_kernels import naive
from hdpo_kernels.sampled.entries import DRAWS, Entries, Sampling, draw, most_entries, new_entries

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = 2**-6


@pytest.fixture(params=["torch", "triton"])
def rows(request):
    return importlib.import_module(f"hdpo_kernels.rows.{request.param}")


@pytest.fixture
def device(rows) -> str:
    return TRITON_DEVICE if rows.__name__.endswith("triton") else "cpu"


def sample(rows, logits: Tensor, labels: Tensor, epsilon: float, draws: Tensor | None = None, **options) -> Entries:
    draws = draw(len(logits), logits.device) if draws is None else draws
    entries = new_entries(len(logits), epsilon, torch.promote_types(logits.dtype, torch.float32), logits.device)
    rows.row_stats(logits.clone(), labels.contiguous(), grad_out=Sampling(epsilon, draws, entries), **options)
    return entries


def dense(entries: Entries, vocab: int) -> Tensor:
    """(n, V) fp64; also checks what entries promise: columns in order, each once, inside the vocabulary."""
    out = torch.zeros(len(entries.counts), vocab, dtype=torch.float64)
    for row, (columns, values, count) in enumerate(zip(*(t.cpu() for t in entries), strict=True)):
        columns = columns[:count].long()
        assert (columns.diff() > 0).all() and (columns >= 0).all() and (columns < vocab).all()
        out[row, columns] = values[:count].double()
    return out


def exact(logits: Tensor, labels: Tensor, bias=None, softcap=None, logit_scale=1.0) -> Tensor:
    """∂logp/∂logits in fp64."""
    z = logits.detach().double().requires_grad_()
    logp = naive._token_logp(z if bias is None else z + bias.double(), labels, softcap, logit_scale).logp
    return torch.autograd.grad(logp.sum(), z)[0].cpu()


def zipf_logits(n: int, vocab: int, device: str) -> tuple[Tensor, Tensor]:
    """Rows between peaked and flat."""
    torch.manual_seed(n)
    z = -torch.log(torch.arange(1.0, vocab + 1) + 2)
    sharpness = torch.linspace(0, 3, n).unsqueeze(1)
    logits = sharpness * (z + torch.randn(n, vocab))
    return logits.to(device), torch.randint(vocab, (n,)).to(device)


def test_the_mean_over_all_draws_is_the_exact_row(rows, device):
    # Draws on a regular grid instead of random ones: whether entry v is taken is one interval of the draw, of
    # length p_v / ε, so the mean over K grid points is off by less than 1 / K of ε. No chance in it.
    vocab, count = 97, 512
    (row,), (label,) = (t.cpu() for t in zipf_logits(1, vocab, "cpu"))
    row = row + torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    logits, labels = row.expand(count, -1).to(device), label.expand(count).to(device)
    draws = torch.arange(count, device=device) * (DRAWS // count) + DRAWS // (2 * count)
    mean = dense(sample(rows, logits, labels, EPSILON, draws), vocab).mean(0)
    assert ((mean - exact(logits[:1], labels[:1])[0]).abs() <= EPSILON * (1 / count + 1e-4)).all()


@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "logit_scale": 0.7}, {"bias": True, "logit_scale": -1.3}])
def test_the_mean_over_random_draws_is_the_exact_row(rows, device, head):
    # An entry below ε is taken with probability p / ε, independently in each row, so by Hoeffding its frequency over
    # `count` rows is off by more than t with a probability below 2 exp(−2 count t²). Over all entries, `alarm` in all.
    vocab, count, alarm = 97, 20_000 if device == "cuda" or rows.__name__.endswith("torch") else 400, 1e-9
    t = math.sqrt(math.log(2 * vocab / alarm) / (2 * count))
    if head.get("bias"):
        head = {**head, "bias": torch.linspace(-1, 1, vocab, device=device)}
    row, label = zipf_logits(3, vocab, device)
    logits, labels = 2 * row[2].expand(count, -1), label[2].expand(count)
    torch.manual_seed(0)
    mean = dense(sample(rows, logits, labels, EPSILON, **head), vocab).mean(0)
    slope = abs(head.get("logit_scale", 1.0))  # the largest that the chain can be
    assert ((mean - exact(logits[:1], labels[:1], **head)[0]).abs() <= t * EPSILON * slope + 1e-6).all()


def hostile(name: str, vocab: int, epsilon: float) -> Tensor:
    """A row of logits."""
    row = torch.full((vocab,), -80.0)
    if name == "flat":
        return torch.zeros(vocab)
    if name == "zipf":
        return -torch.log(torch.arange(1.0, vocab + 1))
    if name == "one-hot":
        row[vocab // 3] = 0
        return row
    count = {"just under epsilon": math.floor(1 / epsilon) + 1, "just over epsilon": math.floor(1 / epsilon)}[name]
    row[torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[:count]] = 0.0
    return row


@pytest.mark.parametrize("name", ["flat", "zipf", "one-hot", "just under epsilon", "just over epsilon"])
@pytest.mark.parametrize(("vocab", "epsilon"), [(97, 1 / 50), (32003, 2**-10), (32003, 1e-3), (256_000, 2**-12)])
def test_hostile_rows_keep_their_mass_and_the_bound(rows, device, name, vocab, epsilon):
    count = 2 if device == "cpu" and rows.__name__.endswith("triton") else 8  # the interpreter takes its time
    logits = hostile(name, vocab, epsilon).expand(count, -1).to(device)
    # a label of some probability and one of none
    labels = torch.tensor([int(logits[0].argmax()), vocab - 1] * (count // 2), device=device)
    draws = torch.tensor([DRAWS - 1, 0, 1, DRAWS // 2, DRAWS // 3, DRAWS - 2, 12345, DRAWS // 7], device=device)
    entries = sample(rows, logits, labels, epsilon, draws[:count])
    got, truth = dense(entries, vocab), exact(logits, labels)
    # A row of the exact gradient sums to zero; Σ q is within ε of one, and p in fp32 sums to one within 1e-6 or so.
    assert (got.sum(1).abs() <= epsilon * (1 + 1e-6) + 3e-6).all()
    assert (entries.counts >= 1).all() and (entries.counts <= most_entries(epsilon)).all()
    probability = -truth.scatter_add(1, labels.cpu().unsqueeze(1), -torch.ones(count, 1, dtype=torch.float64))
    sure = (probability > epsilon * (1 + 1e-5)).scatter(1, labels.cpu().unsqueeze(1), True)
    assert ((got - truth)[sure].abs() <= 1e-6).all()
    tail = got[(probability < epsilon * (1 - 1e-5)).scatter(1, labels.cpu().unsqueeze(1), False)]
    assert ((tail == 0) | (tail == -torch.tensor(epsilon).double())).all()


def test_entries_below_epsilon_are_taken_where_the_running_sum_passes_an_integer(rows, device):
    vocab, epsilon = 32003, 2**-9
    logits, labels = zipf_logits(4, vocab, device)
    draws = draw(4, torch.device(device))
    got = dense(sample(rows, logits, labels, epsilon, draws), vocab)
    p = logits.double().softmax(1).cpu()
    kept = (p >= epsilon).scatter(1, labels.cpu().unsqueeze(1), True)
    sums = (p.masked_fill(kept, 0) / epsilon).cumsum(1) + draws.cpu().unsqueeze(1) / DRAWS
    taken = sums.floor().diff(dim=1, prepend=torch.zeros(4, 1, dtype=torch.float64)) > 0
    # Where the sum comes very near an integer, this entry or the next may be the one.
    near = (sums - sums.round()).abs() < 1e-3
    near[:, 1:] |= near[:, :-1].clone()
    assert torch.equal(((got != 0) & ~kept)[~near], (taken & ~kept)[~near])
    assert near.float().mean() < 0.01


def test_a_small_epsilon_gives_the_exact_row(rows, device):
    logits, labels = zipf_logits(6, 97, device)
    labels[4] = -100
    entries = Entries(
        torch.empty(6, 97, dtype=torch.int32, device=device),
        torch.empty(6, 97, device=device),
        torch.empty(6, dtype=torch.int32, device=device),
    )
    rows.row_stats(logits.clone(), labels, grad_out=Sampling(2.0**-30, draw(6, logits.device), entries), softcap=3.0)
    torch.testing.assert_close(dense(entries, 97), exact(logits, labels, softcap=3.0), rtol=1e-5, atol=2e-6)


def test_rows_that_are_not_scored_have_no_entries(rows, device):
    logits, labels = zipf_logits(5, 97, device)
    labels[2] = -100
    logits[2] = torch.nan
    assert (sample(rows, logits, labels, EPSILON).counts > 0).tolist() == [True, True, False, True, True]


def test_a_nan_stays_in_its_row_and_inside_the_bound(rows, device):
    logits, labels = zipf_logits(4, 97, device)
    logits[2, 5] = torch.nan
    entries = sample(rows, logits, labels, EPSILON)
    got = dense(entries, 97)
    assert entries.counts[2] == most_entries(EPSILON) and got[2].isnan().any()
    assert got[[0, 1, 3]].isfinite().all()


def test_a_label_outside_the_vocabulary_is_no_entry(rows, device):
    logits, labels = zipf_logits(3, 97, device)
    labels[1] = 97
    got = dense(sample(rows, logits, labels, EPSILON), 97)
    assert (got[1] <= 0).all() and (got[[0, 2]] > 0).sum() == 2


def test_logits_switched_off_by_minus_infinity_are_never_taken(rows, device):
    logits, labels = zipf_logits(200, 97, device)
    logits[:, 50:] = -torch.inf
    labels.clamp_(max=49)
    got = dense(sample(rows, logits, labels, EPSILON), 97)
    assert got.isfinite().all() and (got[:, 50:] == 0).all()


def test_entries_of_low_precision_logits_are_those_of_their_fp32_values(rows, device):
    logits, labels = zipf_logits(5, 97, device)
    draws = draw(5, torch.device(device))
    for dtype in (torch.bfloat16, torch.float16):
        low = logits.to(dtype)
        assert torch.equal(
            dense(sample(rows, low, labels, EPSILON, draws), 97),
            dense(sample(rows, low.float(), labels, EPSILON, draws), 97),
        )


def test_torch_and_triton_take_the_same_entries():
    logits, labels = zipf_logits(8, 9001, TRITON_DEVICE)
    draws = draw(8, logits.device)
    both = [
        dense(sample(importlib.import_module(f"hdpo_kernels.rows.{name}"), logits, labels, EPSILON, draws), 9001)
        for name in ("torch", "triton")
    ]
    different = ((both[0] != 0) != (both[1] != 0)).sum()
    assert different <= 2  # their probabilities differ in the last bit, so a running sum may pass at a neighbour
