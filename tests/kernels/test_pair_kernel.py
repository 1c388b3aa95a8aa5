"""The Triton copy of the loss maths against the torch copy and the oracle in fp64, over drawn and extreme inputs."""

import itertools

import pytest
import torch
from torch import Tensor

from hdpo_kernels import naive
from hdpo_kernels.naive import HDPOLoss
from hdpo_kernels.pair import PairOptions
from hdpo_kernels.pairs import torch as torch_pairs
from hdpo_kernels.pairs import triton as triton_pairs
from hdpo_kernels.pairs.scored import Pairs, ScoredStats
from hdpo_kernels.parallel import Ranks
from hdpo_kernels.testing import assert_as_accurate_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_rows(lengths: list[int], seed: int, *, masked: float = 0.2, with_ref: bool = True) -> ScoredStats:
    """Rows of a policy of 2 nats a token, the last fifth of the pairs far from its reference."""
    rng = torch.Generator().manual_seed(seed)
    n, bounds = sum(lengths), [0, *itertools.accumulate(lengths)]
    labels = torch.randint(9, (n,), generator=rng).masked_fill(torch.rand(n, generator=rng) < masked, -100)
    stats = torch.rand(3, n, generator=rng) * torch.tensor([[-4.0], [4.0], [2.0]])
    stats[2].floor_()
    stats *= labels != -100
    ref_logps = naive.sequence_sum(stats[0], bounds) + torch.randn(len(lengths), generator=rng)
    ref_logps[: len(lengths) // 5] *= 50
    ref = ref_logps.to(DEVICE) if with_ref else None
    return ScoredStats(stats.to(DEVICE), labels.to(DEVICE), bounds, torch.tensor(bounds, device=DEVICE), ref)


def run(module, rows: ScoredStats, options: PairOptions, parts: list[int] | None = None) -> Pairs:
    """parts: boundaries in the pairs, which are scored in as many calls, the last first."""
    parts, pairs = [0, len(rows.bounds) // 2] if parts is None else parts, None
    for first, last in reversed(list(itertools.pairwise(parts))):
        pairs = module.score_pairs(pairs, first, last, rows, options, Ranks(None), True)
    return pairs


def oracle(rows: ScoredStats, options: PairOptions) -> tuple[HDPOLoss, Tensor]:
    """The specification in fp64, and its gradient in the log-probability of every row."""
    logp = rows.stats[0].double().requires_grad_()
    logps, *others = (naive.sequence_sum(x, rows.bounds) for x in (logp, *rows.stats[1:].double()))
    lengths = naive.sequence_sum((rows.labels != -100).double(), rows.bounds)
    ref = None if rows.ref_logps is None else rows.ref_logps.double()
    result = naive.pair_loss(logps, ref, lengths=lengths, **vars(options))
    (grad,) = torch.autograd.grad(result.loss, logp, allow_unused=True)
    entropy, accuracy = (sums / lengths.clamp(min=1) for sums in others)
    result = result._replace(entropy=entropy, accuracy=accuracy)
    return result, torch.zeros_like(logp) if grad is None else grad


LOSSES = [*((name, "sequence") for name in triton_pairs.LOSSES), ("sigmoid", "token"), ("hinge", "token")]


def draw_options(seed: int, loss_type: str, level: str) -> PairOptions:
    alpha, beta, smoothing, nll = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    nll, smoothing = (0.0 if (seed // step) % 2 else x for x, step in ((nll, 1), (0.49 * smoothing, 2)))
    return PairOptions(0.5 + alpha, 0.01 + beta, loss_type, smoothing, nll, level)


@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
@pytest.mark.parametrize("seed", range(4))
def test_pair_kernel_is_as_accurate_as_torch(seed, loss_type, level):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 60, (2 * (1 + 3 * seed),), generator=rng).tolist()
    lengths[-1] = 1
    rows, options = make_rows(lengths, seed, with_ref=seed != 3), draw_options(seed, loss_type, level)
    actual, baseline = (run(module, rows, options) for module in (triton_pairs, torch_pairs))
    truth, row_scale = oracle(rows, options)
    rewards = torch.stack([truth.chosen_rewards, truth.rejected_rewards], 1).flatten()
    size = max(float(rewards.abs().max()), float(truth.loss.detach().abs()))  # margins are differences of rewards
    for name, x, y, z in (
        ("loss", actual.terms.sum(), baseline.terms.sum(), truth.loss.detach()),
        ("logps", actual.logps, baseline.logps, truth.logps.detach()),
        ("entropy", actual.entropy, baseline.entropy, truth.entropy),
        ("accuracy", actual.accuracy, baseline.accuracy, truth.accuracy),
        ("rewards", actual.rewards, baseline.rewards, rewards),
        ("margins", actual.margins, baseline.margins, truth.margins),
    ):
        assert_as_accurate_as(x, y, z, scale=size if name in ("loss", "margins") else None, name=name)
    scored = rows.labels != -100  # the others' log-probability is zero, whatever scales its gradient
    assert_as_accurate_as(actual.row_scale[scored], baseline.row_scale[scored], row_scale[scored], name="row_scale")
    torch.testing.assert_close(actual.row_scale, baseline.row_scale, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(actual.slope, baseline.slope, rtol=1e-4, atol=1e-5)


EXTREMES = [0.0, -1e-30, 1.0, -1.0, 17.0, -17.0, 87.0, -104.0, 1e30, -1e30, 3e38, torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
def test_pair_kernel_of_extreme_margins_is_torchs(loss_type, level, smoothing):
    """Margins of any size: u is the reference's difference, since α, β and lengths are 1 and log-probs 0."""
    count = len(EXTREMES)
    ref = torch.stack([torch.zeros(count), torch.tensor(EXTREMES)], 1).flatten().to(DEVICE)
    rows = make_rows([1] * (2 * count), 0, masked=0.0)
    rows = rows._replace(stats=torch.zeros_like(rows.stats), ref_logps=ref)
    options = PairOptions(1.0, 1.0, loss_type, smoothing, alpha_level=level)
    actual, expected = (run(module, rows, options) for module in (triton_pairs, torch_pairs))
    for name, x, y in zip(Pairs._fields, actual, expected, strict=True):
        # a GPU's exp of −87 is a product with log₂ e, rounded at 87; denormal numbers it takes for zero
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-38, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
    assert actual.terms.isnan()[-1] and actual.rewards[-1].isnan()


@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
def test_pair_kernel_tells_a_bad_row_by_its_own_pair_alone(loss_type, level):
    rows, options = make_rows([3, 4, 2, 5, 1, 1], 1, masked=0.0), PairOptions(0.9, 0.3, loss_type, 0.1, 0.2, level)
    clean = run(triton_pairs, rows, options)
    for value, row in ((torch.nan, 8), (-torch.inf, 8), (torch.nan, 11)):
        bad = rows.stats.clone()
        bad[0, row] = value
        actual = run(triton_pairs, rows._replace(stats=bad), options)
        assert not actual.terms[1].isfinite() and torch.equal(actual.terms[[0, 2]], clean.terms[[0, 2]])
        assert torch.equal(actual.row_scale[:7], clean.row_scale[:7])
    with_ref = rows.ref_logps.clone()
    with_ref[3] = torch.nan
    assert run(triton_pairs, rows._replace(ref_logps=with_ref), options).terms.isnan().tolist() == [False, True, False]


def test_pair_kernel_sums_64k_tokens_without_losing_digits_and_to_the_same_bits():
    n, options = 65536, PairOptions(0.95, 1e-3, alpha_level="token")
    rows = make_rows([n, n - 3], 0, masked=0.1)
    first, again, baseline = (run(m, rows, options) for m in (triton_pairs, triton_pairs, torch_pairs))
    truth, row_scale = oracle(rows, options)
    assert_as_accurate_as(first.logps, baseline.logps, truth.logps.detach(), name="logps")
    torch.testing.assert_close(first.row_scale.double(), row_scale.where(rows.labels != -100, first.row_scale.double()))
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("module", [torch_pairs, triton_pairs])
@pytest.mark.parametrize(("loss_type", "level"), LOSSES[2:])
def test_score_pairs_of_some_pairs_at_a_time_are_those_of_all(module, loss_type, level):
    rows, options = make_rows([3, 4, 0, 0, 1, 2, 9, 0], 2), PairOptions(0.9, 0.3, loss_type, 0.1, 0.5, level)
    whole, in_parts = run(module, rows, options), run(module, rows, options, [0, 1, 1, 3, 4])
    for x, y in zip(whole, in_parts, strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


@pytest.mark.parametrize("module", [torch_pairs, triton_pairs])
def test_score_pairs_of_nothing(module):
    options = PairOptions(0.9, 0.3, nll_weight=0.5)
    assert [len(x) for x in run(module, make_rows([], 0), options)] == [0] * 8
    empty = run(module, make_rows([0, 0], 0)._replace(ref_logps=None), options)
    torch.testing.assert_close(empty.terms.cpu(), torch.tensor([2.0]).log())
    assert (
        empty.logps.tolist() == empty.entropy.tolist() == empty.accuracy.tolist() == [0, 0]
        and len(empty.row_scale) == 0
    )
