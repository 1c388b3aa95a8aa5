"""Products of low-precision operands with full-precision results."""

from types import SimpleNamespace

import pytest
import torch

from hdpo_kernels import gemm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mm_into_keeps_full_precision(dtype):
    out_dtype = torch.promote_types(dtype, torch.float32)
    a = torch.randn(3, 96, device=DEVICE).to(dtype)
    weight = torch.randn(gemm.UPCAST_BLOCK + 3, 96, device=DEVICE).to(dtype)
    out = torch.empty(3, len(weight), dtype=out_dtype, device=DEVICE)
    gemm.mm_into(out, a, weight.T)
    truth = a.double() @ weight.double().T
    assert (out - truth).abs().max() < 100 * torch.finfo(out_dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_addmm_into_accumulates_in_full_precision(dtype):
    acc_dtype = torch.promote_types(dtype, torch.float32)
    a = torch.randn(3, gemm.UPCAST_BLOCK + 3, device=DEVICE).to(dtype)
    b = torch.randn(3, 8, device=DEVICE).to(dtype)
    acc = torch.full((a.shape[1], 8), torch.nan, dtype=acc_dtype, device=DEVICE)
    gemm.addmm_into(acc, a.T, b, alpha=0.5, beta=0.0)  # beta = 0 must not read what uninitialised memory holds
    gemm.addmm_into(acc, a.T, b, alpha=2.0)
    truth = 2.5 * a.double().T @ b.double()
    assert (acc - truth).abs().max() < 100 * torch.finfo(acc_dtype).eps


def test_addmm_into_of_no_rows_is_zero():
    acc = torch.full((7, 3), torch.nan, device=DEVICE)
    gemm.addmm_into(acc, torch.empty(7, 0, device=DEVICE), torch.empty(0, 3, device=DEVICE), beta=0.0)
    assert (acc == 0).all()


@pytest.mark.parametrize(("kind", "hip"), [("cuda", "6.4"), ("xpu", None)])
@pytest.mark.parametrize("can", [True, False])
def test_out_dtype_is_tried_once_on_rocm_and_xpu(monkeypatch, kind, hip, can):
    tried = []

    def mm(a, b, *, out_dtype, out):
        tried.append((tuple(a.shape), a.dtype, out_dtype))
        if not can:
            raise RuntimeError("mm with out_dtype is not supported on this device")

    gemm._takes_out_dtype.cache_clear()
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(gemm.torch, "mm", mm)
    monkeypatch.setattr(gemm.torch, "addmm", lambda *args, out_dtype, out: None)
    monkeypatch.setattr(gemm.torch, "ones", lambda *shape, dtype, device: torch.zeros(shape, dtype=dtype))
    operand = SimpleNamespace(device=torch.device(kind), dtype=torch.bfloat16, is_cuda=kind == "cuda")
    assert [gemm._has_out_dtype(operand) for _ in range(3)] == [can] * 3
    assert tried == [((16, 16), torch.bfloat16, torch.float32)]
    gemm._takes_out_dtype.cache_clear()
