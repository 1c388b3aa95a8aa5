"""README.md and docs/: commands and snippets run, tables are those of the result files, links lead somewhere."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hdpo_kernels.pair import LOSS_TYPES, PairOptions
from tests.train.tiny import make_chain, make_records

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Commands run in this order: training first, because evaluating takes its model.
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"), key=lambda path: (path.stem != "training", path.stem))
TEXT = "\n".join([README, *(path.read_text(encoding="utf-8") for path in DOCUMENTS)])


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands name: a model, pairs.jsonl, prompts.jsonl, train.jsonl, my_losses.py, run.yaml."""
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
    (folder / "my_losses.py").write_text(blocks("python")[1])
    options = ["model_name_or_path: model", "dataset_name: pairs.jsonl", "output_dir: from-yaml", "max_steps: 1"]
    (folder / "run.yaml").write_text("\n".join(options))
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "2", "HOME": str(folder)}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_make_commands_exist():
    assert blocks("bash")[0].splitlines() == ["make demo", "make test"]
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:`|^ *)make ([a-z-]+)", TEXT + contributing, re.MULTILINE))
    assert {"check", "bench", "gpu", "real", "test-minimum"} <= targets
    subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)


def test_no_block_of_code_is_left_unchecked():
    """A block in a language that no test here runs would be neither run nor read."""
    assert set(re.findall(r"```(.*?)\n.*?```", TEXT, re.DOTALL)) == {"bash", "json", "python", "diff"}


def test_commands_run_in_order(folder):
    commands = []
    for line in "".join(blocks("bash")[1:]).splitlines():
        name, *arguments = shlex.split(line)
        assert name == "hdpo-train"
        commands.append(arguments)
    # One process for all of them: each would take seconds to import what it needs.
    commands.remove(["train", "--help"])  # which ends its process
    run = "import json, sys; from hdpo_train.__main__ import main; [main(each) for each in json.loads(sys.argv[1])]"
    result = python(folder, "-c", run, json.dumps(commands))
    assert result.returncode == 0, result.stderr[-2000:]
    assert all((folder / name / "metrics.jsonl").exists() for name in ("out-sum", "out-own"))
    assert (folder / "out" / "report.png").exists() and (folder / "from-yaml" / "model.safetensors").exists()
    first, second = (json.loads((folder / name / "results.json").read_text()) for name in ("eval", "eval-again"))
    assert first[1]["sampled"]["0.7"]["entropy"] == second[0]["sampled"]["0.7"]["entropy"]
    assert (folder / "own-eval" / "results.md").exists() and (folder / "sweep" / "sweep.md").exists()
    assert json.loads((folder / "own.jsonl").read_text())["chosen"] == "12"


def test_readme_snippet_of_the_kernels_runs(folder):
    snippet, *_ = blocks("python")
    result = python(folder, "-c", snippet)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "tensor(" in result.stdout


def test_readme_diff_for_trl_users_runs(folder):
    (diff,) = blocks("diff")
    after = "\n".join(line[1:] for line in diff.splitlines() if line[:1] in "+ ")
    result = python(folder, "-c", after.replace('"out"', '"out-diff"'))
    assert result.returncode == 0, result.stderr[-2000:]
    assert (folder / "out-diff" / "metrics.jsonl").exists()


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is not installed")
def test_snippet_for_those_who_stay_in_trl_runs(folder):
    _, _, snippet = blocks("python")
    snippet = snippet.replace('"out-trl"', '"out-trl", use_cpu=True')  # TRL's bf16, its default, asks for it elsewhere
    result = python(folder, "-c", snippet)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "'mean_token_accuracy'" in result.stdout


def test_tables_are_those_of_the_results():
    from benchmarks import report

    assert {"<!-- real: begin -->", "<!-- head: begin -->", "<!-- quickstart: begin -->"} <= set(README.splitlines())
    for path in report.DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert report.filled_in(text) == text, f"{path}: run python -m benchmarks.report"


def test_readme_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 150


def test_losses_of_the_guide_are_all_there_are_with_what_they_cost():
    table = re.findall(r"^\| ([a-z_, .:]+) \| (\d) \| (.*) \|$", TEXT, re.MULTILINE)
    listed = {name: (gemms, memory) for names, gemms, memory in table for name in names.split(", ")}
    assert listed.pop("file.py:function")[0] == "4" and sorted(listed) == sorted(LOSS_TYPES)
    for name, (gemms, memory) in listed.items():
        way = PairOptions(1.0, 0.1, name, label_smoothing=0.1 * (name == "exo_pair")).way
        assert f"{gemms} GEMMs" in way and ("one more buffer" in memory) == ("one more buffer" in way), name


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            file = path.parent / name if name else path
            assert file.exists(), f"{path}: {target}"
            assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{path}: {target}"
