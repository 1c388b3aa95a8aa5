"""Where work is done: the current device, autocast, and numbers of the host on their way to a device."""

import torch

from benchmarks import calls
from benchmarks.fake_gpu import pretended
from hdpo_kernels.device import on_device, to_device


def test_on_device_leaves_gemms_alone_and_autocast_on_afterwards():
    a = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with on_device(a.device):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_on_device_makes_it_the_current_one_and_gives_the_old_one_back():
    for kind in ("cuda", "xpu"):
        with pretended(kind, index=1) as gpu:
            with on_device(gpu.device):
                assert gpu.current == 1
            assert gpu.current == 0


def test_to_device_stages_host_tensors_once_and_takes_pinned_ones_from_where_they_are():
    numbers, pinned = torch.arange(3, dtype=torch.int32), torch.arange(5)
    with pretended() as gpu:
        pinned, there = pinned.pin_memory(), gpu.tensor(2, dtype=torch.int64)
        before = gpu.operations.total()
        moved = to_device([numbers, there, pinned, pinned[:0]], gpu.device)
        assert [(t.shape, t.device) for t in moved] == [((n,), gpu.device) for n in (3, 2, 5, 0)]
        assert moved[1] is there and gpu.operations.total() - before <= 3 and gpu.pageable == []


def test_to_device_on_the_cpu_copies_nothing():
    numbers = torch.arange(3)
    assert to_device([numbers], torch.device("cpu"))[0] is numbers


def test_hdpo_loss_launches_a_copy_rows_pairs_and_a_sum():
    (call,) = [call for call in calls.CALLS if call.function == calls.LOGITS]
    whole = call._replace(head=call.head._replace(vocab=32000))  # a row fits a program
    for each, most in ((call, 5), (whole, 4)):
        outcome = calls.run(each)
        assert (outcome.forward.launches, outcome.backward.launches) == (most, 1)
