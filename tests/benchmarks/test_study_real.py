"""The study on a real model: its task's checkers, its claims, and all of it on a tiny model, stopped and resumed."""

import csv
import json
from pathlib import Path

import pytest
import torch

from benchmarks.study import instructions as task
from benchmarks.study import real, real_report
from benchmarks.study.__main__ import main, study_real
from benchmarks.study.real import CORE, DPO, UNTRAINED, Settings
from hdpo_train.evaluation.problems import Problem
from hdpo_train.quickstart.model import train_tokenizer
from tests.train.tiny import VOCAB, make_model

TINY = Settings(pair_prompts=5, pair_samples=4, held_out=5, samples=2, max_new_tokens=6, epochs=2)


@pytest.mark.parametrize(
    ("kind", "value", "right", "wrong"),
    [
        ("keyword", "river", "The River froze early.", "The rivers froze early."),
        ("length", 6, "The river froze early this year.", "The cold river froze early this year."),
        ("count", "two commas", "Rain, snow, ice and wind.", "Rain, snow and ice came."),
        ("count", "one comma", "Rain, snow and ice came.", "Rain, snow, ice and wind."),
        ("ending", "a question mark", "Did the river freeze?", "The river froze early!"),
        ("ending", "an exclamation mark", "The river froze early!", "Did the river freeze?"),
        ("start", "never", "Never swim in winter.", "You never swim here."),
        ("at least", 6, "The river froze early this year.", "The river froze this year."),
        ("without letter", "w", '"Rivers freeze early here."', "Winter came early here."),
        ("without word", "the", "Rivers froze early there.", "The river froze early."),
        ("no comma", "a comma", "Rain and snow came.", "Rain, snow and ice came."),
    ],
)
def test_constraints_hold_for_what_they_say(kind, value, right, wrong):
    problem = Problem("", {"kind": kind, "value": value})
    assert task.is_right(problem, right) and not task.is_right(problem, wrong)
    for other in ("", "...", f"{right} {right}", right[:-1] + ",", f"{right}\nYes, it did, and early.", "Yes."):
        assert not task.is_right(problem, other)


def test_prompts_are_different_and_have_kinds_of_their_own():
    drawn = [task.problems(kinds, 52, seed=1) for kinds in (task.TRAINING_KINDS, task.EVALUATION_KINDS)]
    assert drawn[0] == task.problems(task.TRAINING_KINDS, 52, seed=1) != task.problems(task.TRAINING_KINDS, 52, seed=2)
    texts = [problem.prompt[0]["content"] for problems in drawn for problem in problems]
    assert len(set(texts)) == 104 and texts[0].startswith("Write one short sentence about ")
    kinds = [{problem.record["kind"] for problem in problems} for problems in drawn]
    assert [len(each) for each in kinds] == [4, 5] and not kinds[0] & kinds[1]


def row(condition, epoch, seed, entropy, accuracy, temperature=1.0):
    figures = {metric: accuracy for metric in real.METRICS} | {"entropy": entropy, "margin": 0.0}
    return {"condition": condition.name, "epoch": epoch, "seed": seed, "temperature": temperature, **figures}


def test_equal_entropy_is_between_rows_and_not_beyond_them():
    path = [row(DPO, epoch, 0, *of) for epoch, of in enumerate([(3.0, 0.1), (2.0, 0.5), (1.0, 0.3)])]
    at = [real_report.at_equal_entropy(path, row(CORE[0], 2, 0, e, 0), "pass@k") for e in (2.5, 1.25, 0.9)]
    assert at == [pytest.approx(0.3), pytest.approx(0.35), None]


def test_report_says_what_is_there_and_tests_only_enough_seeds():
    rows = [row(DPO, 3, seed, 2.0 + 0.01 * seed, 0.5) for seed in range(4)]
    rows += [row(CORE[0], 3, seed, 1.0, 0.6 + 0.01 * seed) for seed in range(3)]
    rows += [row(CORE[1], 3, seed, 3.0, 0.6) for seed in range(2)]
    text = real_report.markdown(rows, Settings(), "", "real.png")
    assert "**9 of 61 runs are there**" in text and f"{CORE[0].name} (seeds 3, 4)" in text
    assert "| α = 0.7 by sequence | 3 | 3 | 61.0 ± 2.5 |" in text and "| α = 1.4 by sequence | 3 | 2 | 60.0 |" in text
    compared = [line for line in text.splitlines() if line.split(" | ")[1:2] == ["DPO"]]
    assert len(compared) == 1 and "**+11.0 ± 2.5** (p " in compared[0] and "here are 4" in text


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch):
    folder = tmp_path / "model"
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[1] *= 5  # the tokenizer's end: answers end
    model.save_pretrained(folder)
    texts = [problem.prompt[0]["content"] for problem in task.problems(task.KINDS, 100, 0)]
    tokenizer = train_tokenizer(texts, VOCAB)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(real.task, "is_right", lambda problem, answer: len(answer) % 2 == 0)
    monkeypatch.setattr(real, "CONDITIONS", [DPO, CORE[2], UNTRAINED])
    monkeypatch.setattr(real, "GRID", [])
    return folder


def test_report_of_nothing_says_so(tiny_model, tmp_path):
    with pytest.raises(SystemExit, match="no run is finished"):
        study_real([], tmp_path / "work", tmp_path / "out", tiny_model, TINY)


def test_study_stopped_and_gone_on_with_gives_the_same_rows(tiny_model, tmp_path, monkeypatch):
    study_real([0], tmp_path / "whole", tmp_path / "a", tiny_model, TINY)
    evaluate, calls = real.Study._evaluate, []

    def stopped(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 4:  # in the second run
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(real.Study, "_evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        study_real([0], tmp_path / "stopped", tmp_path / "b", tiny_model, TINY)
    study_real([0], tmp_path / "stopped", tmp_path / "b", tiny_model, TINY)
    done = len(calls)
    study_real([0], tmp_path / "stopped", tmp_path / "b", tiny_model, TINY)
    assert len(calls) == done  # nothing was done again
    one, other = ((tmp_path / name / "real.csv").read_text() for name in "ab")
    assert one == other
    rows = list(csv.DictReader(one.splitlines()))
    assert sorted((r["condition"], r["epoch"], r["temperature"]) for r in rows if r["condition"] != DPO.name) == [
        (UNTRAINED.name, "0", "1"), (CORE[2].name, "1", "1"), (CORE[2].name, "2", "1"),
    ]  # fmt: skip
    assert sum(row["condition"] == DPO.name for row in rows) == 4 and json.loads(rows[0]["pairs"]) > 0


def test_seeds_are_for_the_real_study(capsys):
    with pytest.raises(SystemExit):
        main(["--seeds", "1"])
    assert "--seeds is for --real" in capsys.readouterr().err
