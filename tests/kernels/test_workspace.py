"""What is said of the head's memory, against what its call takes."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import calls
from hdpo_kernels import linear_hdpo_loss, lm_head
from hdpo_kernels.workspace import head_workspace_bytes

CALLS_OF_THE_LOSS = [c for c in calls.CALLS if c.function == calls.LOSS and c.needs_grad and not c.masked]
SIZES = dict(vocab=6000, hidden_size=64)


def make(lengths, dtype, requires_grad=True, device="cpu"):
    torch.manual_seed(0)
    hidden = torch.randn(sum(lengths), SIZES["hidden_size"], dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(SIZES["vocab"], SIZES["hidden_size"], dtype=dtype, device=device)
    labels = torch.randint(0, SIZES["vocab"], (sum(lengths),))
    return hidden, weight.requires_grad_(requires_grad), labels, [0, *itertools.accumulate(lengths)]


def measured(call) -> int:
    """Bytes at the peak of a call above those before it, as torch's allocator saw them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = call()
    del result
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["d_weight", "d_hidden alone"])
@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([300, 200], {}),
        ([2500, 1500], {}),
        ([900, 700, 800, 600], {}),  # two pairs in pieces: a second d_weight
        ([2500, 1500], {"nll_weight": 0.5}),
        ([2500, 1500], {"loss_type": "apo_zero"}),
        ([900, 700, 800, 600], {"f_divergence_type": "js_divergence"}),
        ([300, 200], {"chunk_bytes": 2**21}),
        ([2500, 1500], {"gradient": "sampled", "epsilon": 0.01}),
    ],
    ids=str,
)
def test_head_workspace_bytes_are_within_15_percent_of_what_is_taken(dtype, trained, lengths, options):
    hidden, weight, labels, cu_seqlens = make(lengths, dtype, trained)
    asked = {key: value for key, value in options.items() if key != "epsilon"}
    kept, passing = head_workspace_bytes(hidden, weight, cu_seqlens, **asked)
    lm_head._kept.__dict__.clear()
    peak = measured(lambda: linear_hdpo_loss(hidden, weight, labels, cu_seqlens, None, **options))
    assert lm_head._kept.memory.nbytes == pytest.approx(kept, abs=1024)
    results = hidden.nbytes + weight.numel() * 4 * trained
    if "gradient" in options:
        results = hidden.shape[0] * (1 / options["epsilon"] + 2) * 8
    assert abs(kept + passing + results - peak) < 0.15 * peak, (kept, passing, results, peak)


@pytest.mark.parametrize("call", CALLS_OF_THE_LOSS, ids=lambda call: call.name)
def test_head_workspace_bytes_of_a_gpu_are_within_5_percent(call):
    outcome = calls.run(call)
    hidden, weight = outcome.inputs
    with calls._autocast(hidden.device.type, call.weight_dtype != torch.bfloat16):
        kept, passing = head_workspace_bytes(
            hidden, weight, [0, *itertools.accumulate(call.lengths)], gradient="sampled" if call.sampled else "exact"
        )
    results = call.num_rows * 8 * 1026 if call.sampled else hidden.nbytes + weight.numel() * 4
    assert kept == 0
    assert passing + results == pytest.approx(outcome.forward.peak_mib * 2**20, rel=0.05)
