"""The pretended GPU counts what starts something, keeps track of memory, and refuses what a GPU would wait for."""

import os

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from triton.runtime.jit import JITFunction

from benchmarks.fake_gpu import check_gemm, pretended


@triton.jit
def _add_kernel(x_ptr, out_ptr, N, BLOCK: triton.language.constexpr):
    pass


@pytest.fixture
def gpu():
    with pretended() as gpu:
        yield gpu


def test_operations_are_counted_but_neither_views_nor_allocations(gpu):
    x = gpu.tensor(8, 4)
    torch.empty_like(x).copy_(x[2:].T.reshape(4, 6).T.new_zeros(8, 4)).add_(x.unsqueeze(0).expand(1, 8, 4)[0])
    torch.mul(x, 2, out=x.new_empty(8, 4))
    x.float().view(-1).to(torch.float32)
    assert gpu.operations == {"new_zeros": 1, "copy_": 1, "add_": 1, "mul": 1, "_to_copy": 1}


def test_peak_is_of_what_is_in_use_at_a_time(gpu):
    x = gpu.tensor(1024, 1024)  # an input, 2 MiB
    for _ in range(3):
        y = x + 1
        z = y[:512] * 2
        del y, z
    assert gpu.peak_bytes == 3 * 2**20
    kept = x.new_empty(1, dtype=torch.uint8)
    x.float()
    assert gpu.peak_bytes == 4 * 2**20 + 512 and kept.numel() == 1


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: bool((x == 0).all()), DataDependentOutputException),
        (lambda x: x.tolist(), DataDependentOutputException),
        (lambda x: x.nonzero(), DynamicOutputShapeException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x.cpu(), AssertionError),
        (lambda x: torch.zeros(3).copy_(x), AssertionError),
        (lambda x: x[torch.tensor([0, 1])], AssertionError),
        (lambda x: x + torch.zeros(3), AssertionError),
    ],
)
def test_what_waits_for_the_device_or_reads_the_host_raises(gpu, wait, error):
    with pytest.raises(error):
        wait(gpu.tensor(3, dtype=torch.float32))


def test_copies_are_pageable_unless_their_memory_is_pinned(gpu):
    bounds = torch.tensor([1, 2, 3])
    assert bounds.to(gpu.device, non_blocking=True).device == gpu.device
    gpu.tensor(3, dtype=torch.int64).copy_(bounds[:2].expand(3, 2)[:, 0])
    assert gpu.pageable == [(3,), (3,)]
    pinned = torch.empty(5, pin_memory=True)
    assert bounds.pin_memory().is_pinned() and pinned[2:].is_pinned() and not bounds.is_pinned()
    bounds.pin_memory().to(gpu.device), gpu.tensor(3).copy_(pinned[2:]), gpu.tensor(3).mul_(torch.tensor(2.0))
    assert len(gpu.pageable) == 2 and gpu.operations == {"_to_copy": 2, "copy_": 2, "mul_": 1}


def test_backward_gives_the_gradients_that_autograd_would(gpu):
    x, y, unused = (gpu.tensor(3, 2, dtype=torch.float32, needs_grad=True) for _ in range(3))
    product = (x * y).exp()
    d_x, d_y, none = gpu.backward(((product @ x.T) * gpu.tensor(3, 3)).sum() + product.mean(), [x, y, unused])
    assert d_x.shape == d_y.shape == (3, 2) and none is None
    # One sum in forward; two paths lead to the product, and two to x.
    assert {name: gpu.operations[name] for name in ("exp", "mm", "add")} == {"exp": 1, "mm": 3, "add": 3}


def test_launches_are_counted_and_checked(gpu):
    x, out = gpu.tensor(8), gpu.tensor(8)
    _add_kernel[(2, 65535)](x, out, 8, BLOCK=4, num_warps=2)
    _add_kernel[lambda arguments: (arguments["BLOCK"],)](x, out, 8, 4)
    assert gpu.kernels == {"_add_kernel": 2} and not gpu.operations
    for grid, arguments in (
        ((2, 65536), (x, out, 8, 4)), ((0,), (x, out, 8, 4)), ((2,), (x, torch.zeros(8), 8, 4)),
        ((2,), (x, out, torch.float32, 4)),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            _add_kernel[grid](*arguments)
    with pytest.raises(TypeError, match="missing a required argument: 'BLOCK'"):
        _add_kernel[(2,)](x, out, 8)
    with pytest.raises(AssertionError, match="no arguments"):
        _add_kernel[(2,)](x, out, 8, 4, BLOCK_V=3)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_launches_go_to_the_current_device(kind):
    with pretended(kind, index=1) as gpu:
        x = gpu.tensor(8)
        with pytest.raises(AssertionError, match=rf"x_ptr is on {kind}:1, not on 0"):
            _add_kernel[(2,)](x, x, 8, 4)
        with getattr(torch, kind).device(1):
            _add_kernel[(2,)](x, x, 8, 4)
        with torch.accelerator.device_index(1):
            _add_kernel[(2,)](x, x, 8, 4)
        assert gpu.current == 0 and gpu.kernels == {"_add_kernel": 2}


def test_nothing_stays_as_it_was_pretended():
    def settings():
        names = ("_lazy_init", "current_device", "_exchange_device")
        triton_settings = (
            triton.knobs.runtime.interpret,
            os.environ.get("TRITON_INTERPRET"),
            triton.runtime.driver._active,
        )
        return *triton_settings, torch.version.hip, JITFunction.run, *(getattr(torch.cuda, name) for name in names)

    before = settings()
    with pretended("hip"):
        assert not triton.knobs.runtime.interpret and torch.version.hip
        assert all(now != then for now, then in zip(settings()[2:], before[2:], strict=True))
    assert settings() == before


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("a", "b", "add", "out", "out_dtype", "message"),
    [
        ((4, 6, BF16), (6, 2, BF16), (4, 2, FP32), (4, 2, FP32), FP32, ""),
        ((4, 6, BF16), (6, 2, BF16), None, None, BF16, ""),
        ((4, 6, BF16), (6, 2, FP32), None, None, BF16, "b is torch.float32"),
        ((4, 6, BF16), (6, 2, BF16), None, None, torch.float16, "out_dtype is torch.float16"),
        ((4, 6, BF16), (4, 2, BF16), None, None, BF16, r"\(4, 6\) @ \(4, 2\)"),
        ((4, 6, BF16), (6, 2, BF16), (4, 2, torch.float16), None, FP32, "what is added is torch.float16"),
        ((4, 6, BF16), (6, 2, BF16), None, (4, 2, BF16), FP32, "out: torch.bfloat16"),
        ((4, 6, BF16), (6, 2, BF16), None, (2, 4, BF16), BF16, r"out: torch.bfloat16 \(2, 4\)"),
    ],
)
def test_check_gemm_refuses_what_cublas_refuses(a, b, add, out, out_dtype, message):
    tensors = [None if t is None else torch.zeros(t[:2], dtype=t[2]) for t in (a, b, add, out)]
    if not message:
        return check_gemm(*tensors, out_dtype)
    with pytest.raises(AssertionError, match=message):
        check_gemm(*tensors, out_dtype)


def test_check_gemm_refuses_operands_that_would_be_copied(gpu):
    wide = torch.zeros(8, 12)
    check_gemm(wide[:4, :6], wide[:4, 2:8].T, None, wide[4:, :4], FP32)
    for a, b in ((wide[:4, ::2], torch.zeros(6, 2)), (torch.zeros(1, 6).expand(4, 6), torch.zeros(6, 2))):
        with pytest.raises(AssertionError, match="is copied first"):
            check_gemm(a, b, None, None, FP32)
    x, half = gpu.tensor(4, 6), gpu.tensor(6, 2)
    with pytest.raises(AssertionError, match=r"b is torch\.float32"):
        x @ half.float()
    with pytest.raises(AssertionError, match="is copied first"):
        x[:, ::2].mm(half[:3])
    acc = gpu.tensor(4, 2, dtype=FP32)
    torch.addmm(acc, x, half, out_dtype=FP32, out=acc), torch.mm(x, half, out_dtype=FP32, out=acc)
    with pytest.raises(AssertionError, match=r"out: torch\.bfloat16"):
        torch.mm(x, half, out_dtype=FP32, out=gpu.tensor(4, 2))
