"""The door of the package, and what stays outside."""

import ast
import subprocess
import sys
from pathlib import Path

import hdpo_kernels

PACKAGE = Path(hdpo_kernels.__file__).parent


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [[alias.name for alias in node.names] for node in ast.walk(tree) if isinstance(node, ast.Import)]
    names += [[node.module or "."] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name for group in names for name in group}


def test_all_is_the_public_names():
    assert hdpo_kernels.__all__ == [
        "HDPOLoss",
        "TokenLogp",
        "hdpo_loss",
        "linear_hdpo_loss",
        "linear_logp",
        "naive",
        "pair_loss",
        "sequence_sum",
    ]
    assert all(hasattr(hdpo_kernels, name) for name in hdpo_kernels.__all__)


def test_import_and_use_on_the_cpu_need_torch_alone():
    code = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch, hdpo_kernels
hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
labels = torch.tensor([0, 1, 2, 3])
hdpo_kernels.linear_hdpo_loss(hidden, weight, labels, [0, 2, 4], None).loss.backward()
print([name for name in ("transformers", "hdpo_train", "hdpo_kernels.rows.triton") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == []


def test_naive_imports_nothing_from_the_package():
    assert {name.split(".")[0] for name in imported_modules(PACKAGE / "naive.py")} <= {
        "itertools",
        "math",
        "typing",
        "torch",
    }


def test_package_imports_torch_and_triton_alone():
    allowed = {"hdpo_kernels", "torch", "triton", *sys.stdlib_module_names}
    for path in PACKAGE.rglob("*.py"):
        assert {name.split(".")[0] for name in imported_modules(path)} <= allowed, path.name


def test_testing_is_imported_by_tests_and_benchmarks_alone():
    for path in PACKAGE.rglob("*.py"):
        assert "hdpo_kernels.testing" not in imported_modules(path), path.name
