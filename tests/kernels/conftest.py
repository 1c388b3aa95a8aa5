import sys

import pytest
import torch

from hdpo_kernels import lm_head, rows


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
    """A device on which row operations are torch's, then one on which they are Triton's: a GPU or the interpreter."""
    if request.param == "torch":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    from hdpo_kernels.rows import torch as torch_rows
    from hdpo_kernels.rows import triton as triton_rows

    original = rows.backend
    for name, module in list(sys.modules.items()):
        if name.startswith("hdpo_kernels") and getattr(module, "backend", None) is original:
            monkeypatch.setattr(module, "backend", lambda t: triton_rows if t.element_size() < 8 else torch_rows)
    return "cpu"
