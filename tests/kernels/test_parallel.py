"""The vocabulary or the tokens of sequences on several ranks: the same loss and gradients as on one."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdpo_kernels import naive
from hdpo_kernels.parallel import merge_stats

ROOT = Path(__file__).parents[2]
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def rows(request):
    return importlib.import_module(f"hdpo_kernels.rows.{request.param}")


@pytest.fixture
def device(rows) -> str:
    return TRITON_DEVICE if rows.__name__.endswith("triton") else "cpu"


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_get_the_loss_and_gradients_of_one(ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(ROOT / "tests" / "kernels" / "parallel_worker.py")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert "compared" in result.stdout


def merged(rows, logits, labels, cuts, grad=None, **options):
    """row_stats of the shards between cuts, their statistics merged as ranks would, and their gradients together."""
    seen = []

    def collect(stats):
        seen.append(stats)
        return stats

    shards = list(zip([0, *cuts], [*cuts, logits.shape[1]], strict=True))
    own = [torch.where((labels >= a) & (labels < b), labels - a, b - a) for a, b in shards]
    own = [x.masked_fill(labels == -100, -100) for x in own]
    for (a, b), mine in zip(shards, own, strict=True):
        rows.row_stats(logits[:, a:b].clone(), mine, merge=collect, **options)
    together = merge_stats(torch.stack(seen))
    results = []
    for (a, b), mine in zip(shards, own, strict=True):
        part = None if grad is None else grad[:, a:b]
        results.append(rows.row_stats(logits[:, a:b].clone(), mine, grad_out=part, merge=lambda _: together, **options))
    return results[0]


@pytest.mark.parametrize("cuts", [[1], [40, 41, 90], [96]])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.7}])
def test_merged_statistics_are_those_of_the_whole_row(rows, device, cuts, options):
    torch.manual_seed(0)
    dtype = torch.float64 if rows.__name__.endswith("torch") else torch.float32
    logits = (8 * torch.randn(6, 97)).to(device, dtype)
    labels = torch.tensor([0, 96, 40, -100, 41, 50], device=device)
    grad, expected = torch.empty_like(logits), torch.empty_like(logits)
    actual = merged(rows, logits, labels, cuts, grad, **options)
    whole = rows.row_stats(logits.clone(), labels, grad_out=expected, **options)
    tolerance = 1e-11 if dtype == torch.float64 else 4e-6
    for x, y in zip((*actual, grad), (*whole, expected), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cuts", [[1], [5, 6, 9]])
def test_merged_is_top1_is_that_of_the_whole_row_with_ties(rows, device, cuts):
    logits = torch.randint(3, (24, 12), generator=torch.Generator().manual_seed(0)).float().to(device)
    labels = torch.arange(24, device=device) % 12
    labels[9] = -100
    expected = rows.row_stats(logits.clone(), labels).is_top1
    assert torch.equal(merged(rows, logits, labels, cuts).is_top1, expected) and 5 < expected.sum() < 20


def test_merged_statistics_of_hostile_rows(rows, device):
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)).to(device)
    logits[0, 10:] = -torch.inf  # a shard switched off
    logits[1, 3] = torch.nan
    labels = torch.tensor([2, 2, 25, 15], device=device)  # the third is outside
    actual = merged(rows, logits, labels, [10])
    truth = naive._token_logp(logits, labels.clamp(max=19), None, 1.0)
    torch.testing.assert_close(actual.logp[[0, 3]], truth.logp[[0, 3]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actual.entropy[[0, 3]], truth.entropy[[0, 3]], rtol=1e-6, atol=1e-6)
    assert actual.logp[[1, 2]].isnan().all() and (actual.is_top1[[1, 2]] == 0).all()
