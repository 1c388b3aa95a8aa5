"""The branches for CUDA, ROCm and XPU, at the sizes of real models, on a pretended GPU: checked, counted, not computed.

No host waits for a device in any call here: `benchmarks.fake_gpu` raises where one would.
"""

import csv
import itertools
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from benchmarks import calls
from benchmarks.calls import CALLS, LARGE, LOGITS, LOGP, LONG, ODD, SMALL, Call, Outcome
from hdpo_kernels import linear_hdpo_loss
from hdpo_kernels.pair import LOSS_TYPES

COMMITTED = Path(calls.__file__).parent / "results" / "launches.csv"
GIB = 2**30


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {call.name: calls.run(call) for call in CALLS}


@pytest.fixture(params=CALLS, ids=lambda call: call.name)
def call(request) -> Call:
    return request.param


def test_results_are_fp32_on_the_device_one_for_each_sequence(outcomes, call):
    results, device = outcomes[call.name].results, outcomes[call.name].gpu.device
    assert {(t.dtype, t.device) for t in results} == {(torch.float32, device)}
    n, sequences = call.num_rows, len(call.lengths)
    pairs = sequences // 2
    of_pairs = [(), (sequences,), (sequences,), (pairs,), (pairs,), (pairs,), (sequences,)]
    expected = [(n,)] * 3 if call.function == LOGP else of_pairs
    assert [t.shape for t in results] == expected


def test_gradients_are_like_their_inputs(outcomes, call):
    outcome = outcomes[call.name]
    described = [[(t.shape, t.dtype, t.device) for t in ts] for ts in (outcome.gradients, outcome.inputs)]
    assert described[0] == (described[1] if call.needs_grad else [])


def most_bytes(call: Call) -> int:
    """Above inputs: results, d_weight in fp32 while it is gathered, and 1 GiB of buffers, more for a wide head."""
    n, (hidden_size, vocab, _) = call.num_rows, call.head
    hidden, weight = 2 * n * hidden_size, 2 * vocab * hidden_size  # bytes in bf16
    buffers = max(GIB, 7680 * vocab + GIB // 16)  # 384 rows of fp32 logits, 3,072 of bf16 gradients, and the rest
    if call.function == LOGITS:
        return 2 * n * vocab + GIB // 16
    if not call.needs_grad:
        return buffers
    if call.sampled:
        return buffers + hidden + weight + 2 * 8 * 1026 * n  # entries, and the same sorted by vocabulary
    total = buffers + hidden + 2 * weight
    if call.lengths == (8192,) * 4:
        total += 2 * weight  # what the second long pair gathers
    if call.masked:
        total += hidden  # of scored rows, half of all: hidden states and their gradient
    if call.weight_dtype != torch.bfloat16:
        total += weight  # the head cast to bf16
    return total + (GIB // 8 if call.kind in ("hip", "xpu") else 0)  # blocks of operands in fp32


def test_peak_memory_is_as_derived(outcomes, call):
    peak = max(counts.peak_mib for counts in outcomes[call.name][1:3] if counts is not None)
    assert peak * 2**20 <= most_bytes(call)


def test_the_committed_table_is_what_is_counted_now(outcomes):
    with open(COMMITTED, newline="", encoding="utf-8") as file:
        committed = list(csv.DictReader(file))
    counted = [counts._asdict() for each in outcomes.values() for counts in each[1:3] if counts is not None]
    if committed[0]["torch"] != counted[0]["torch"]:
        pytest.skip(f"the table is of torch {committed[0]['torch']}, not {counted[0]['torch']}")
    now = [{name: str(value) for name, value in row.items()} for row in counted]
    assert committed == now, "run python -m benchmarks.static"


@pytest.mark.parametrize(("call", "most"), [(SMALL, 28), (ODD, 70), (LARGE, 110)], ids=lambda x: getattr(x, "name", x))
def test_launches_are_as_few_as_they_should_be(outcomes, call, most):
    assert sum(counts.launches for counts in outcomes[call.name][1:3]) <= most


def test_nothing_is_copied_from_pageable_memory(outcomes):
    counts = [counts for each in outcomes.values() for counts in each[1:3] if counts is not None]
    assert {each.call: each.pageable for each in counts if each.pageable} == {}


@pytest.mark.parametrize("name", [SMALL.name, "Llama-3-8B, 8 pairs, sampled", "Qwen2.5-0.5B, 8 pairs, no gradient",
                                  "Llama-3-8B, 8 pairs, from logits", "Llama-3-8B, 8 pairs, XPU"])  # fmt: skip
def test_calls_run_on_the_device_of_their_tensors(name):
    (call,) = [call for call in CALLS if call.name == name]
    assert {t.device.index for t in calls.run(call, index=1).results} == {1}


def test_a_long_pair_is_cut_like_a_short_one(outcomes):
    """What is launched grows with the rows, not faster: 16 times as many in about 16 times as many tiles."""
    long, short = (outcomes[each.name].forward.kernels for each in (LONG, LARGE))
    assert 14 < long / short < 18


def test_boundaries_on_the_device_are_seen_to_wait():
    with calls.pretended() as gpu:
        hidden, weight = gpu.tensor(8, 16), gpu.tensor(100, 16)
        bounds, labels = gpu.tensor(3, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            linear_hdpo_loss(hidden, weight, labels, bounds, None)


@pytest.mark.parametrize("lengths", [[40] * 4, [1500, 1400, 900, 1600]], ids=["whole pairs", "parts of pairs"])
@pytest.mark.parametrize("loss_type", [*LOSS_TYPES, ("sigmoid", "apo_zero", "sft")], ids=str)
def test_no_loss_waits_for_the_device_or_copies_from_pageable_memory(loss_type, lengths):
    rows, vocab, hidden_size = sum(lengths), 8000, 64
    with calls.pretended() as gpu:
        hidden, weight = gpu.tensor(rows, hidden_size, needs_grad=True), gpu.tensor(vocab, hidden_size, needs_grad=True)
        ref_logps = gpu.tensor(len(lengths), dtype=torch.float32)
        labels, bounds = torch.zeros(rows, dtype=torch.int64), [0, *itertools.accumulate(lengths)]
        options = {"loss_type": loss_type, "label_smoothing": 0.1 if loss_type == "exo_pair" else 0.0}
        options["chunk_bytes"] = 1000 * vocab * 6
        result = linear_hdpo_loss(hidden, weight, labels, bounds, ref_logps, **options)
        gpu.backward(result.loss, [hidden, weight])
    assert gpu.pageable == [] and result.loss.device.type == "cuda"
