import os

import pytest


@pytest.fixture(autouse=True)
def devices_as_before(monkeypatch: pytest.MonkeyPatch):
    """What a command hides from its own process is not hidden from the tests that follow."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
