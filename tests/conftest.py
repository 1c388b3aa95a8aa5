"""Settings of the test process. Triton reads TRITON_INTERPRET when it is imported, so it is set before anything is."""

import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels run on CPU tensors, as numpy
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic


def pytest_configure(config: pytest.Config) -> None:
    # −inf − −inf in a lane that a mask or a `where` drops is NaN on a GPU too, where nobody is warned of it.
    config.addinivalue_line("filterwarnings", r"ignore::RuntimeWarning:triton\.runtime\.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
