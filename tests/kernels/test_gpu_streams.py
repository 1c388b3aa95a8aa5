"""What the host and the device owe each other: a call waits for nothing, and a CUDA graph can hold it."""

import pytest
import torch

from benchmarks.small import captured
from hdpo_kernels import hdpo_loss, linear_hdpo_loss
from hdpo_kernels.testing import zipf_inputs

pytestmark = pytest.mark.gpu

SECOND = 2_000_000_000  # of a GPU's cycles, about


def from_logits(hidden, weight, *rest):
    return hdpo_loss(hidden @ weight.T, *rest)


def sampled(*inputs):
    return linear_hdpo_loss(*inputs, gradient="sampled", epsilon=2**-6)


FUNCTIONS = pytest.mark.parametrize("function", [linear_hdpo_loss, from_logits, sampled])


def on_device(lengths, seed=0):
    """Leaves hidden and weight, labels, boundaries in pinned memory, and reference, the labels on the device."""
    inputs = zipf_inputs(lengths, 2048, 64, dtype=torch.bfloat16, device="cuda", masked=0.2, seed=seed)
    leaves = [t.requires_grad_() for t in inputs[:2]]
    return [*leaves, inputs.labels, torch.tensor(inputs.cu_seqlens).pin_memory(), inputs.ref_logps]


def loss_and_gradients(function, inputs):
    loss = function(*inputs).loss
    return loss.detach(), *torch.autograd.grad(loss, inputs[:2])


@FUNCTIONS
@pytest.mark.parametrize("labels", ["on the host", "on the device"])
def test_a_call_of_65536_rows_returns_while_the_stream_is_asleep(function, labels):
    inputs = on_device([8192] * 8)
    if labels == "on the host":
        inputs[2] = inputs[2].cpu()  # pageable, and 512 KiB: a copy of it would wait for the stream
    for _ in range(2):  # compiles, and allocates what the allocators then keep
        loss_and_gradients(function, inputs)
    torch.cuda.synchronize()
    awake = torch.cuda.Event()
    torch.cuda._sleep(SECOND)
    awake.record()
    assert not awake.query()
    loss, *_ = loss_and_gradients(function, inputs)
    assert not awake.query(), "the call waited for what the stream had to do before it"
    assert loss.isfinite()


@pytest.mark.parametrize("function", [linear_hdpo_loss, from_logits])
def test_a_captured_call_replays_on_other_numbers(function):
    lengths = [100, 37, 64, 80, 1, 90]
    inputs, others = on_device(lengths), on_device(lengths, seed=1)
    results = [t.clone() for t in loss_and_gradients(function, inputs)]

    def run():
        for result, new in zip(results, loss_and_gradients(function, inputs), strict=True):
            result.copy_(new)

    replay = captured(run)
    for source in (others, on_device(lengths)):
        with torch.no_grad():
            for t, new in zip(inputs, source, strict=True):
                t.copy_(new)
        loss_and_gradients(function, on_device([3, 200, 5, 7]))  # what this copies from the host is not the graph's
        replay()
        torch.testing.assert_close(tuple(results), loss_and_gradients(function, source))
