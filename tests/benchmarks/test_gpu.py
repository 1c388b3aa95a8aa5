"""One command for a GPU: it ends in its time whatever its stages do, and tells what they found."""

import time

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import gpu
from benchmarks.gpu import Result, Stage
from benchmarks.table import Table

HANG = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('hangs', flush=True); time.sleep(60)"
CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
POLITE = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # of a shell's background job it is ignored
print("measured", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("written")
"""


def python(text: str):
    return lambda minutes: ["-c", text]


def test_run_ends_in_its_time_whatever_hangs(tmp_path):
    todo = [Stage("hangs", 1, python(HANG)), Stage("child", 1, python(CHILD)), Stage("polite", 1, python(POLITE))]
    begin = time.monotonic()
    results = gpu.run(todo, 9 / 60, tmp_path, grace=0.7)
    assert time.monotonic() - begin < 10
    assert [(result.name, result.status) for result in results] == [(each.name, "out of time") for each in todo]
    assert results[0].said == "hangs" and (tmp_path / "polite.log").read_text().split()[:1] == ["measured"]


def test_run_asks_a_stage_to_write_what_it_has_before_it_ends_it(tmp_path):
    (result,) = gpu.run([Stage("polite", 1, python(POLITE))], 62 / 60, tmp_path, grace=60)
    assert result.status == "out of time" and result.said == "written"


def test_run_gives_what_is_left_over_to_the_stages_that_follow(tmp_path):
    given = []

    def command(minutes):
        given.append(60 * minutes)
        return ["-c", "print('done')"]

    todo = [Stage("a b", 1, command), Stage("fails", 1, python("raise SystemExit('no kernel image')")),
            Stage("c", 2, command)]  # fmt: skip
    first, failed, last = gpu.run(todo, 2.0, tmp_path, grace=5.0)
    assert (first.status, failed.status, last.status) == ("ok", "failed", "ok")
    assert first.said == "done" and failed.said == "no kernel image" and (tmp_path / "a-b.log").exists()
    assert given[0] == pytest.approx(25, abs=0.1) and given[1] > 100


def test_stages_are_correctness_then_every_question(tmp_path):
    todo = gpu.stages(tmp_path, peers=False)
    assert [stage.name for stage in todo[:3]] == ["tests at real sizes", "other tests", "loss"]
    assert {stage.name for stage in todo[2:]} == set(benchmarks.QUESTIONS) == set(gpu.HEADLINES)
    assert todo[-1].name == "longest"
    loss = " ".join(todo[2].command(1.5))
    assert "--device cuda --only loss" in loss and loss.endswith("--minutes 1.50") and "--without trl liger cce" in loss
    assert "--without" not in " ".join(gpu.stages(tmp_path, peers=True)[2].command(1.5))


def test_run_leaves_time_for_a_first_shape_of_each_question(monkeypatch, tmp_path):
    """Of ten minutes, where every stage takes all that it is given; only `longest` then has too little."""
    now, given = [0.0], {}
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def use_up(stage, seconds, log, grace):
        now[0] += seconds + grace
        given[stage.name] = seconds
        return Result(stage.name, seconds, "out of time", "")

    monkeypatch.setattr(gpu, "_run", use_up)
    gpu.run(gpu.stages(tmp_path, peers=False), 10, tmp_path)
    assert now[0] == pytest.approx(600)
    short = {name for name, seconds in benchmarks.ESTIMATES.items() if given[name] < seconds}
    assert short == {"longest"} and given["tests at real sizes"] > 50


def test_table_has_our_figure_or_what_was_said_last():
    rows = Table("cpu")
    rows.add("loss", "Llama-3-8B N=8192", "naive", "share of three GEMMs", (0.5,), "×")
    rows.add("loss", "Llama-3-8B N=8192", "hdpo_kernels", "share of three GEMMs", (0.87, 0.8, 0.9), "×")
    results = [Result("other tests", 61.4, "failed", "2 failed, 600 passed in 60 s"), Result("loss", 90.0, "ok", "x"),
               Result("longest", 4.0, "out of time", "")]  # fmt: skip
    assert gpu.table(results, rows.rows).splitlines()[2:] == [
        "| other tests | failed | 61 | 2 failed, 600 passed in 60 s |",
        "| loss | ok | 90 | Llama-3-8B N=8192: share of three GEMMs 0.87 × |",
        "| longest | out of time | 4 | |",
    ]


def test_main_says_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2 and "torch sees no GPU here" in capsys.readouterr().err


def test_main_runs_all_stages_and_fails_if_one_did(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "device_name", lambda _: "a GPU")
    monkeypatch.setattr(gpu, "stages", lambda out, peers: [Stage("loss", 1, python("print('all well')"))])
    with pytest.raises(SystemExit) as end:
        gpu.main(["--minutes", "1", "--out", str(tmp_path)])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "a GPU" in said and "| loss | ok | 0 | all well |" in said
