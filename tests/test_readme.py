"""Every command and snippet of the README runs, and its tables are those of the result files."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny import make_chain, make_records

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the README's commands name: a model, pairs.jsonl, prompts.jsonl, train.jsonl, run.yaml."""
    from tests.train.conftest import tokenizer

    folder, tokens = tmp_path_factory.mktemp("readme"), tokenizer.__wrapped__()
    ask, one, two, three = (tokens(text)["input_ids"][0] for text in "?123")
    end = {tokens.eos_token_id: 1.0}  # of the answers 1, 12 and 3: right is 12
    chain = make_chain({ask: {one: 0.6, three: 0.4}, one: {two: 0.7, **dict.fromkeys(end, 0.3)}, two: end, three: end})
    chain.save_pretrained(folder / "model")
    tokens.save_pretrained(folder / "model")
    records = [*make_records(), json.loads(blocks("json")[0])]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("prompts.jsonl", "train.jsonl"):
        (folder / name).write_text(blocks("json")[1])
    options = ["model_name_or_path: model", "dataset_name: pairs.jsonl", "output_dir: from-yaml", "max_steps: 1"]
    (folder / "run.yaml").write_text("\n".join(options))
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "2", "HOME": str(folder)}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_readme_make_commands_exist():
    commands = [line for line in blocks("bash")[0].splitlines() if line]
    assert commands == ["make demo", "make test"]
    for command in commands:
        subprocess.run([*command.split(), "-n"], cwd=ROOT, check=True, capture_output=True)


def test_readme_training_commands_run_in_order(folder):
    commands = []
    for line in "".join(blocks("bash")[1:]).splitlines():
        name, *arguments = shlex.split(line)
        assert name == "hdpo-train"
        commands.append(arguments)
    # One process for all of them: each would take seconds to import what it needs.
    assert commands.pop(0) == ["--help"]  # which ends its process
    run = "import json, sys; from hdpo_train.__main__ import main; [main(each) for each in json.loads(sys.argv[1])]"
    result = python(folder, "-c", run, json.dumps(commands))
    assert result.returncode == 0, result.stderr[-2000:]
    assert (folder / "out" / "report.png").exists() and (folder / "from-yaml" / "model.safetensors").exists()
    first, second = (json.loads((folder / name / "results.json").read_text()) for name in ("eval", "eval-again"))
    assert first[1]["sampled"]["0.7"]["entropy"] == second[0]["sampled"]["0.7"]["entropy"]
    assert (folder / "own-eval" / "results.md").exists() and (folder / "sweep" / "sweep.md").exists()
    assert json.loads((folder / "own.jsonl").read_text())["chosen"] == "12"


def test_readme_snippet_of_the_kernels_runs(folder):
    (snippet,) = blocks("python")
    result = python(folder, "-c", snippet)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "tensor(" in result.stdout


def test_readme_diff_for_trl_users_runs(folder):
    (diff,) = blocks("diff")
    after = "\n".join(line[1:] for line in diff.splitlines() if line[:1] in "+ ")
    result = python(folder, "-c", after.replace('"out"', '"out-diff"'))
    assert result.returncode == 0, result.stderr[-2000:]
    assert (folder / "out-diff" / "metrics.jsonl").exists()


def test_readme_file_map_is_complete():
    listed = set(re.findall(r"(\w+\.py)\b", README.split("## Files")[1].split("## Training")[0]))
    for package in ("hdpo_kernels", "hdpo_train"):
        for path in (ROOT / package).glob("*.py"):
            assert path.name in listed | {"__init__.py"}, f"{package}/{path.name} is not in the README's file map"


def test_readme_tables_are_those_of_the_results():
    from benchmarks import report

    assert {"<!-- benchmarks: begin -->", "<!-- quickstart: begin -->"} <= set(README.splitlines())
    for path in report.READMES:
        text = path.read_text(encoding="utf-8")
        assert report.filled_in(text) == text, f"{path}: run python -m benchmarks.report"
