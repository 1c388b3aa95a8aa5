import sys

import pytest
import torch

from hdpo_kernels import lm_head, pairs, rows, sampled


@pytest.fixture(autouse=True)
def hostile_memory():
    """Uninitialised memory holds NaN, and an operation that is not deterministic raises."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    lm_head._kept.__dict__.clear()  # a test finds no memory of another
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device on which row and pair operations and sparse products are torch's, then one on which they are Triton's.

    The latter is a GPU, or the interpreter.
    """
    if request.param == "torch":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    from hdpo_kernels.pairs import torch as torch_pairs
    from hdpo_kernels.pairs import triton as triton_pairs
    from hdpo_kernels.rows import torch as torch_rows
    from hdpo_kernels.rows import triton as triton_rows
    from hdpo_kernels.sampled import torch as torch_products
    from hdpo_kernels.sampled import triton as triton_products

    for name, original, triton, torch_ in (
        ("backend", rows.backend, triton_rows, torch_rows),
        ("pair_operation", pairs.pair_operation, triton_pairs, torch_pairs),
        ("products", sampled.products, triton_products, torch_products),
    ):
        pick = lambda t, triton=triton, torch_=torch_: triton if t.element_size() < 8 else torch_  # noqa: E731
        for module in [m for path, m in sys.modules.items() if path.startswith("hdpo_kernels")]:
            if getattr(module, name, None) is original:
                monkeypatch.setattr(module, name, pick)
    return "cpu"
