"""The oldest versions that are declared are those that `make test-minimum` installs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = (
    "torch", "triton", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "matplotlib", "pyyaml",
    "psutil", "peft", "sacrebleu",
)  # fmt: skip


def versions(file: str, operator: str) -> dict[str, tuple[int, ...]]:
    """Package -> version after the operator, without the zeros at its end."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.findall(rf"\b([a-z]+){operator}([0-9]+(?:\.[0-9]+)*)", text)
    return {name: tuple(map(int, re.sub(r"(\.0)+$", "", version).split("."))) for name, version in found}


def test_the_declared_minimum_is_what_is_installed_for_its_test():
    declared, installed = versions("pyproject.toml", ">="), versions("constraints-minimum.txt", "==")
    assert {name: declared[name] for name in NEEDED} == installed


def test_the_pinned_versions_are_not_older_than_the_declared_minimum():
    declared, pinned = versions("pyproject.toml", ">="), versions("constraints.txt", "==")
    assert {name for name in NEEDED if name in pinned and pinned[name] < declared[name]} == set()
    assert {"torch", "triton", "transformers"} <= pinned.keys()
