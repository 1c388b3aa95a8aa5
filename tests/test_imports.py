"""Imports go one way, between the folders of a package and between files, and training imports no judging."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(package: str) -> dict[str, set[str]]:
    """Of every module of the package, the modules of it that it imports, in functions too."""
    modules = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text("utf-8"))
    found: dict[str, set[str]] = {}
    for name, tree in modules.items():
        used: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                used |= {each if each in modules else node.module for each in inner}
        found[name] = (used & modules.keys()) - {name}
    return found


def folder(module: str) -> str:
    """The folder in the package that a module is in, or the module itself where it is in none."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("package", ["hdpo_kernels", "hdpo_train", "benchmarks"])
def test_no_module_and_no_folder_imports_itself_by_a_detour(package):
    files = imports(package)
    assert len(files) > 10
    tuple(graphlib.TopologicalSorter(files).static_order())  # raises CycleError, which names the circle
    folders: dict[str, set[str]] = {}
    for module, used in files.items():
        folders.setdefault(folder(module), set()).update({folder(each) for each in used} - {folder(module), package})
    tuple(graphlib.TopologicalSorter(folders).static_order())


def test_training_imports_no_judging_and_no_command_line():
    files, seen = imports("hdpo_train"), set()
    todo = ["hdpo_train.trainer"]
    while todo:
        if (module := todo.pop()) not in seen:
            seen.add(module)
            todo += files[module]
    assert {"hdpo_train.model.generation", "hdpo_train.run.resuming"} <= seen
    assert not {"evaluation", "sweep", "quickstart", "cli", "training"} & {
        each.split(".")[1] for each in seen if "." in each
    }
