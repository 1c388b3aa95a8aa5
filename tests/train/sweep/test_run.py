"""A sweep at a tiny size: what is there isn't repeated, what was killed is redone, and the report of known figures."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hdpo_train import quickstart
from hdpo_train.cli.main import main
from hdpo_train.evaluation.evaluate import EvalOptions
from hdpo_train.evaluation.scores import Estimate, Evaluation, Scores
from hdpo_train.run.lock import LOCK_FILE
from hdpo_train.run.report import read_metrics
from hdpo_train.sweep import report as sweep_report
from hdpo_train.sweep.report import Sweep, match_temperature, metrics
from hdpo_train.sweep.run import Plan, TaskModel, _Job, sweep, words
from hdpo_train.trainer import HDPOTrainer
from tests.train.commands import refused
from tests.train.tiny import make_model, make_records


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model with its tokenizer, pairs and prompts."""
    from tests.train.conftest import tokenizer

    folder = tmp_path_factory.mktemp("inputs")
    make_model(spread=1.0).save_pretrained(folder / "model")
    tokenizer.__wrapped__().save_pretrained(folder / "model")
    for name, records in (("pairs", make_records(8)), ("prompts", [{"prompt": f"{i}. Say sun:"} for i in range(3)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def arguments(inputs: Path, folder: Path, **options) -> list[str]:
    values = {
        "model_name_or_path": inputs / "model", "dataset_name": inputs / "pairs.jsonl", "alpha": "0.7", "seeds": 2,
        "prompts": inputs / "prompts.jsonl", "checker": "regex:[a-m]", "output_dir": folder, "max_new_tokens": 3,
        "num_samples": 4, "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
    }  # fmt: skip
    return ["sweep", *words({**values, **options}), "--temperatures", "0.5", "1.5"]


@pytest.fixture(scope="module")
def swept(inputs, tmp_path_factory):
    """The folder of a finished sweep; a test that changes it leaves it finished."""
    folder = tmp_path_factory.mktemp("sweep")
    main(arguments(inputs, folder))
    return folder


@pytest.fixture
def jobs(monkeypatch):
    """The names of the jobs that run."""
    names: list[str] = []
    run = _Job.run
    monkeypatch.setattr(_Job, "run", lambda job: (names.append(job.name), run(job))[1])
    return names


def modified(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/**/*") if path.is_file()}


def test_sweep_leaves_runs_evaluations_and_a_report(swept):
    result = Sweep.load(swept / "results.json")
    assert sorted(result.runs) == [0.7, 1.0] and result.seeds == 2 and len(result.base) == 1
    for alpha, seeds in result.runs.items():
        for seed, evaluation in enumerate(seeds):
            run = swept / f"alpha-{alpha:g}" / f"seed-{seed}"
            assert Evaluation.load(run / "evaluation.json") == evaluation
            assert read_metrics(run)[0]["alpha"] == alpha and (run / "model.safetensors").exists()
            assert sorted(evaluation.sampled) == ([0.5, 1.0, 1.5] if alpha == 1 else [1.0])
    assert len(list((swept / "reference").iterdir())) == 1  # of all runs together
    text = (swept / "sweep.md").read_text()
    for line in ("| before training |", "| α = 0.7 |", "| α = 1 (DPO) |", "| T = 0.5 |", "Page's trend test"):
        assert line in text
    assert "have model and pairs in common" in text and (swept / "sweep.png").stat().st_size > 10_000


def test_sweep_seeds_differ_in_data_order_and_samples(swept):
    first, second = (read_metrics(swept / "alpha-1" / f"seed-{seed}") for seed in (0, 1))
    assert first[0] == second[0] and first[1]["loss"] != second[1]["loss"]


def test_sweep_repeats_nothing(inputs, swept, jobs, capsys):
    before = modified(swept)
    main(arguments(inputs, swept))
    assert jobs == [] and modified(swept) == before
    assert "5 models evaluated, 5 of them before" in capsys.readouterr().out


def test_sweep_runs_only_what_is_new(inputs, swept, jobs, tmp_path, capsys):
    before = modified(swept)
    main(arguments(inputs, swept, alpha="1.4", seeds=1))  # the folder's 0.7 and second seed stay part of it
    assert jobs == ["α = 1.4, seed 0", "α = 1.4, seed 1"]
    assert before.items() <= modified(swept).items()
    assert "| α = 1.4 |" in (swept / "sweep.md").read_text()
    assert "4 of 7: α = 1.4, seed 0\n" in capsys.readouterr().out


def test_sweep_evaluates_a_trained_model_without_training_it_again(inputs, swept, jobs):
    run = swept / "alpha-0.7" / "seed-1"
    before = modified(swept)
    evaluation = (run / "evaluation.json").read_text()
    (run / "evaluation.json").unlink()
    main(arguments(inputs, swept))
    assert jobs == ["α = 0.7, seed 1"] and (run / "evaluation.json").read_text() == evaluation
    changed = {path.name for path, time in modified(swept).items() if before.get(path) != time}
    assert changed == {"evaluation.json"}  # not the samples either: none was missing


@pytest.mark.parametrize("save_steps", [1, 500])
def test_sweep_goes_on_with_a_killed_run(inputs, tmp_path, jobs, monkeypatch, capsys, save_steps):
    folder, save = tmp_path / "sweep", HDPOTrainer.save_model

    def killed(trainer, output_dir=None, *args, **kwargs):
        if output_dir is None:  # not a checkpoint's
            raise KeyboardInterrupt
        return save(trainer, output_dir, *args, **kwargs)

    argv = arguments(inputs, folder, alpha="1", seeds=1, save_steps=save_steps)
    monkeypatch.setattr(HDPOTrainer, "save_model", killed)
    with pytest.raises(SystemExit, match="130"):
        main(argv)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("hdpo-train sweep: interrupted in 2 of 2, α = 1, seed 0;") and "goes on" in message
    assert not (folder / "alpha-1" / "seed-0").exists() and (folder / "alpha-1" / "seed-0.partial").exists()
    monkeypatch.setattr(HDPOTrainer, "save_model", save)
    resumed = []
    train = HDPOTrainer.train
    monkeypatch.setattr(
        HDPOTrainer,
        "train",
        lambda self, *args, **kwargs: (train(self, *args, **kwargs), resumed.append(self.state))[0],
    )
    main(argv)
    assert jobs == ["before training", "α = 1, seed 0", "α = 1, seed 0"]
    assert resumed[0].global_step == 2 and len(list((folder / "alpha-1" / "seed-0").glob("checkpoint-*"))) == (
        2 if save_steps == 1 else 1
    )
    steps = [line["step"] for line in read_metrics(folder / "alpha-1" / "seed-0") if "loss" in line]
    assert steps == [1, 2] if save_steps == 1 else steps == [2]
    assert not (folder / "alpha-1" / "seed-0.partial").exists()


@pytest.mark.parametrize(("name", "option"), [("pairs", "dataset_name"), ("prompts", "prompts")])
def test_sweep_refuses_pairs_and_prompts_that_have_changed_at_the_same_time_and_size(
    name, option, inputs, swept, capsys
):
    path = inputs / f"{name}.jsonl"
    text, times = path.read_text(), path.stat()
    try:
        path.write_text(text.replace("Say", "say"))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        message = refused(arguments(inputs, swept), capsys)
    finally:
        path.write_text(text)
    assert message.count("contents of") == 2 and f"this call has contents of {option} = " in message


def test_sweep_and_eval_refuse_a_folder_that_another_process_has(inputs, tmp_path, capsys):
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('', flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / LOCK_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        assert "in use by another process" in refused(arguments(inputs, tmp_path), capsys)
        words = ["eval", "--prompts", "p.jsonl", "--checker", "gsm8k", "--samples", "s.jsonl", "--output_dir"]
        assert "in use by another process" in refused([*words, str(tmp_path)], capsys)
        other.communicate("\n")


def test_sweep_does_a_run_of_a_process_that_died(inputs, swept, tmp_path, monkeypatch):
    folder, names, run = tmp_path / "sweep", [], _Job.run
    shutil.copytree(swept, folder)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(folder / f"{LOCK_FILE}-alpha-1.6-seed-0")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        monkeypatch.setattr(_Job, "run", lambda job: (names.append(job.name), run(job), other.kill()))
        main(arguments(inputs, folder, alpha="1.6"))
    assert names == ["α = 1.6, seed 1", "α = 1.6, seed 0"] and not list(folder.glob("_lock*"))
    assert "| α = 1.6 |" in (folder / "sweep.md").read_text()


def test_sweep_refuses_other_settings_and_names_them(inputs, swept, capsys):
    message = refused(arguments(inputs, swept, learning_rate=2e-3), capsys)
    assert "learning_rate = 0.001, this call has learning_rate = 0.002" in message
    assert "num_samples = 4, this call has num_samples = 8" in refused(arguments(inputs, swept, num_samples=8), capsys)
    message = refused(arguments(inputs, swept, checker="regex:z"), capsys)
    assert "checker = regex:[a-m], this call has checker = regex:z" in message
    assert "beta = the default, this call has beta = 0.3" in refused(arguments(inputs, swept, beta=0.3), capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": "0.9,0"}, "alpha must be a positive number, got 0"),
        ({"alpha": "0.9,0.12345678"}, "at most six digits"),
        ({"target_entropy": "0.9"}, "leave out alpha_schedule and target_entropy"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"seed": 3}, "--seed is set by the sweep"),
        ({"checker": "gsm8kk"}, "gsm8kk"),
        ({"checker": "gsm8k"}, "answer"),
        ({"alhpa": 1}, "--alhpa"),
        ({"prompts": "/nowhere/prompts.jsonl"}, "/nowhere/prompts.jsonl"),
        ({"dataset_name": "/nowhere/pairs.jsonl"}, "/nowhere/pairs.jsonl"),  # before the model is evaluated
        ({"max_length": 2}, "8 of the 8 records"),
        ({"eval_strategy": "steps"}, "--eval_strategy needs data"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive whole number, got 0"),
        ({"batch_size": 0}, "batch_size must be a positive whole number, got 0"),
    ],
)
def test_sweep_refuses_at_the_door(inputs, tmp_path, options, words, capsys):
    assert words in refused(arguments(inputs, tmp_path / "sweep", **options), capsys)
    assert not (tmp_path / "sweep").exists()


def test_sweep_refuses_half_a_model_and_a_folder_of_something_else(inputs, tmp_path, capsys):
    assert "needs --model_name_or_path, --dataset_name" in refused(["sweep", "--checker", "gsm8k"], capsys)
    (tmp_path / "thesis.tex").write_text("precious")
    assert "not a sweep" in refused(arguments(inputs, tmp_path), capsys)


def test_sweep_help_teaches(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["sweep", "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--alpha",
        "--seeds",
        "--sft_per_seed",
        "--checker",
        "can temperature alone do it?",
        "only what is new",
    ):
        assert word in text


# A task that a model without any training solves now and then: an answer of an even number of characters is right.
EVEN = SimpleNamespace(
    TITLE="Even answers", MAX_NEW_TOKENS=3, MAX_LENGTH=16,
    split_prompts=lambda num, seed: ([f"{i}:" for i in range(20)], [f"{seed} {i}:" for i in range(num)]),
    demonstrate=lambda prompt, rng: " " + rng.choice(["a", "bcd"]),
    is_right=lambda prompt, answer: len(answer) % 2 == 0,
)  # fmt: skip
SETTINGS = quickstart.Settings(
    hidden_size=16, num_layers=1, vocab_size=270, sft_steps=3, sft_batch_size=4, pair_prompts=10, batch_size=8,
    epochs=1, held_out=3,
)  # fmt: skip


def test_sweep_of_a_task_makes_models_and_pairs_per_seed_or_once(tmp_path, monkeypatch):
    training = words({**quickstart.training_options(SETTINGS), "use_cpu": True, "max_steps": 1})
    plan = Plan((1.0,), 2, tuple(training), EvalOptions(2, (1.0,), 3, 64, k=(1, 2), self_bleu=False))
    taught, sft = [], quickstart.sft
    monkeypatch.setattr(quickstart, "sft", lambda *args: (taught.append(args[1].seed), sft(*args))[1])
    result = sweep(tmp_path / "once", TaskModel(EVEN, SETTINGS, per_seed=False), plan)
    assert taught == [0] and len(result.base) == 1 and result.seeds == 2
    killed = tmp_path / "each" / "base" / "seed-1.partial"
    result = sweep(tmp_path / "each", TaskModel(EVEN, SETTINGS, per_seed=True), replace(plan, seeds=1))
    killed.mkdir()
    (killed / "model.safetensors").write_text("half")
    result = sweep(tmp_path / "each", TaskModel(EVEN, SETTINGS, per_seed=True), plan)
    assert taught == [0, 0, 1] and len(result.base) == 2 and not killed.exists()
    prompts = [(tmp_path / "each" / "base" / f"seed-{seed}" / "prompts.jsonl").read_text() for seed in (0, 1)]
    assert '"0 0:"' in prompts[0] and '"1 0:"' in prompts[1]
    assert "intervals are of the whole pipeline" in (tmp_path / "each" / "sweep.md").read_text()
    with pytest.raises(ValueError, match="sft_per_seed = True, this call has sft_per_seed = False"):
        sweep(tmp_path / "each", TaskModel(EVEN, SETTINGS, per_seed=False), plan)


def figures(accuracy: float, entropy: float, temperature: float = 1.0) -> Scores:
    def estimate(value: float) -> Estimate:
        return Estimate(value, value, value)

    return Scores(
        temperature, 8, estimate(accuracy), {1: estimate(accuracy), 4: estimate(1 - (1 - accuracy) ** 4)},
        estimate(8 * accuracy), {1: estimate(0.1), 2: estimate(0.2)}, None, estimate(entropy),
    )  # fmt: skip


def evaluation(points: dict[float, tuple[float, float]]) -> Evaluation:
    """points: temperature -> accuracy, entropy."""
    sampled = {temperature: figures(*point, temperature) for temperature, point in points.items()}
    return Evaluation("made up", 10, figures(0.5, 0.0, 0.0), sampled)


def made_up(seeds: int = 3) -> Sweep:
    """α = 0.8 is better than temperature, 1.2 is on its curve, 2 outside of what the temperatures reach."""
    rng = random.Random(0)
    runs: dict[float, list[Evaluation]] = {0.8: [], 1.0: [], 1.2: [], 2.0: []}
    for _ in range(seeds):
        x, noise = rng.gauss(0, 0.02), lambda: rng.gauss(0, 0.001)
        runs[1.0].append(evaluation({0.5: (0.8 + x, 0.5), 1.0: (0.6 + x, 1.0), 1.5: (0.4 + x, 2.0)}))
        runs[0.8].append(evaluation({1.0: (0.9 + x + abs(noise()) / 10, 0.75)}))
        runs[1.2].append(evaluation({1.0: (0.5 + x + noise(), 1.5)}))
        runs[2.0].append(evaluation({1.0: (0.3 + x, 3.0)}))
    return Sweep("Made up", True, [evaluation({1.0: (0.55, 1.2)}) for _ in range(seeds)], runs)


def test_match_temperature_interpolates_at_equal_entropy():
    result = made_up()
    found = metrics(result)
    dpo = evaluation({0.5: (0.8, 0.5), 1.0: (0.6, 1.0), 1.5: (0.4, 2.0)})
    run = evaluation({1.0: (0.9, 0.75)})  # half-way between T = 0.5 and 1, where α = 1 has 0.7
    match = match_temperature(run, dpo, [found["sampled accuracy"]], found["entropy"])
    assert match.temperature == pytest.approx(0.75)
    assert match.differences == {"sampled accuracy": pytest.approx(20)}
    run = evaluation({1.0: (0.5, 1.25)})  # a quarter of the way from T = 1 to 1.5
    match = match_temperature(run, dpo, [found["sampled accuracy"]], found["entropy"])
    assert match.temperature == pytest.approx(1.125) and match.differences["sampled accuracy"] == pytest.approx(-5)
    for entropy in (0.4, 2.1):
        run = evaluation({1.0: (0.5, entropy)})
        assert match_temperature(run, dpo, [found["sampled accuracy"]], found["entropy"]) is None


def test_conclusions_are_decided_by_the_figures():
    text = "\n".join(sweep_report.conclusions(made_up()))
    assert "Entropy after training rises with α: Page's trend test, L = 90, p = 7.2e-05" in text  # 4!⁻³
    assert "Sampled accuracy, compared with α = 1: higher with α = 0.8; lower with α = 1.2, 2." in text
    assert "Greedy accuracy, compared with α = 1: not distinguishable with α = 0.8, 1.2, 2." in text
    assert re.search(
        r"α = 0.8 against temperature scaling of α = 1 at equal entropy: sampled accuracy better \(\+20", text
    )
    assert "α = 1.2 against temperature scaling of α = 1 at equal entropy: sampled accuracy not distinguishable" in text
    assert "α = 2 is not compared with temperature: for 3 of 3 seeds" in text
    falling = made_up()
    falling.runs[2.0][:] = [evaluation({1.0: (0.3, 0.1)})] * 3
    assert "is not shown to rise with α" in sweep_report.trend_sentence(falling)


def test_report_of_one_seed_draws_no_conclusion(tmp_path):
    text = sweep_report.write(made_up(seeds=1), tmp_path)
    assert "One seed: no interval." in text and "±" not in text and "One seed shows no difference" in text
    assert Sweep.load(tmp_path / "results.json") == made_up(seeds=1)


def measured(temperatures, n: int, ks, entropy: bool = True) -> Evaluation:
    """An evaluation of n samples with pass@k of these k; entropy: whether the model's head gave it."""
    scores = {t: replace(figures(0.5, t, t), num_samples=n) for t in (0.0, *temperatures)}
    e = Estimate(0.5, 0.5, 0.5)
    for t, each in scores.items():
        scores[t] = replace(each, pass_at={k: e for k in ks}, entropy=each.entropy if entropy else None)
    return Evaluation("made up", 2, scores.pop(0.0), scores)


@pytest.mark.parametrize(
    ("n", "ks", "temperatures", "alphas", "seeds", "entropy"),
    [
        (2, (1,), (0.5, 1.0), (0.8, 1.0), 2, True),  # hdpo-train sweep --num_samples 2
        (1, (1,), (1.0,), (1.0,), 1, True),
        (8, (4, 8), (1.0,), (1.0, 1.2), 3, True),
        (2, (2,), (1.0,), (0.8, 1.0, 1.2), 2, False),
        (4, (1,), (0.5, 1.0, 2.0), (1.0,), 2, False),
    ],
)
def test_report_of_any_combination_of_options(tmp_path, n, ks, temperatures, alphas, seeds, entropy):
    runs = {
        alpha: [measured(temperatures if alpha == 1 else (1.0,), n, ks, entropy) for _ in range(seeds)]
        for alpha in alphas
    }
    swept = Sweep("a $file_{ of $5", False, [measured((1.0,), n, ks, entropy)], runs)
    text = sweep_report.write(swept, tmp_path)
    assert "| before training | 50.0 % |" in text and (tmp_path / "sweep.png").stat().st_size > 10_000
    assert (tmp_path / "sweep.md").read_text() == text and Sweep.load(tmp_path / "results.json") == swept
    for k in ks:
        assert (f"pass@{k}" in text) == (k > 1)
    assert ("temperature alone" in text) == entropy and ": ." not in text
    assert ("There is only α = 1" in text) == (alphas == (1.0,) and seeds > 1)


def test_report_without_matplotlib_has_all_but_the_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "sweep.png").write_text("of an earlier report")
    sweep_report.write(made_up(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.md", "results.json"}
    assert "sweep.png" not in (tmp_path / "sweep.md").read_text()
    (line,) = capsys.readouterr().err.splitlines()
    assert "sweep.png is not drawn" in line and "pip install 'hdpo[train]'" in line


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_sweep_refuses_a_damaged_evaluation_before_it_trains(inputs, swept, jobs, capsys, share):
    path = swept / "alpha-1" / "seed-1" / "evaluation.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    message = refused(arguments(inputs, swept, alpha="0.3"), capsys)
    path.write_bytes(whole)
    sweep_file = json.loads((swept / "sweep.json").read_text())
    (swept / "sweep.json").write_text(
        json.dumps({**sweep_file, "alphas": [a for a in sweep_file["alphas"] if a != 0.3]})
    )
    assert f"{path} is damaged" in message and "delete it" in message and jobs == []


def test_sweep_refuses_a_damaged_sweep_file(inputs, swept, capsys):
    path = swept / "sweep.json"
    whole = path.read_text()
    for damaged in (whole[:40], "[]", "[" * 100_000, '{"alphas": 1, "seeds": 2, "settings": {}}'):
        path.write_text(damaged)
        message = refused(arguments(inputs, swept), capsys)
        path.write_text(whole)
        assert f"{path} is damaged" in message and "choose another --output_dir" in message


def test_tables_hold_means_and_intervals():
    result = made_up()
    table = sweep_report.figures_table(result, ["sampled accuracy", "entropy"])
    assert table.splitlines()[2] == "| before training | 55.0 ± 0.0 % | 1.200 ± 0.000 |"
    assert "| α = 0.8 | " in table and "0.750 ± 0.000 |" in table
    differences = sweep_report.differences_table(result)
    assert "| α = 2 | +0.0 ± 0.0 % | **-30.0 ± 0.0 %** |" in differences and "here are 21)" in differences
    assert "| α = 2 | 0 of 3 |" in sweep_report.frontier_table(result)


def test_bars_of_the_plot_are_intervals_of_the_difference_to_alpha_1():
    """Seeds that are far apart, and an α that adds 1, 2 and 3 points to each: 2 ± t · 1 / √3."""
    runs = {1.0: [0.2, 0.5, 0.8], 0.8: [0.21, 0.52, 0.83]}
    result = Sweep("Made up", True, [], {a: [evaluation({1.0: (x, 1.0)}) for x in seeds] for a, seeds in runs.items()})
    metric = metrics(result)["sampled accuracy"]
    assert sweep_report._point(result, 0.8, metric) == pytest.approx((52, 4.303 / 3**0.5), rel=1e-3)
    assert sweep_report._point(result, 1.0, metric) == (pytest.approx(50), 0.0)
