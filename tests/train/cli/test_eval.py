"""hdpo-train eval in this process: models, ready-made samples, going on, and messages a person can act on."""

import json
import sys
from pathlib import Path

import pytest

from hdpo_train.cli import judging as problems
from hdpo_train.cli.main import main
from hdpo_train.evaluation.sampler import Sampler
from hdpo_train.evaluation.scores import from_json
from tests.train.commands import refused, write
from tests.train.tiny import make_model

PROMPTS = [{"prompt": f"{i}. Say sun:", "answer": str(i % 3), "question": "ask"} for i in range(4)]
MODELS = ("before", "after")


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(MODELS):
        make_model(seed=seed, spread=20.0).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "prompts.jsonl", PROMPTS)
    return tmp_path


def words(folder: Path, **options) -> list[str]:
    values = {
        "prompts": folder / "prompts.jsonl", "checker": "regex", "output_dir": folder / "out", "max_new_tokens": 4,
        "num_samples": 4, "temperatures": [0.5, 1], "batch_size": 8, **options,
    }  # fmt: skip
    listed = {name: value if isinstance(value, list | tuple) else [value] for name, value in values.items()}
    return ["eval", *(word for name, value in listed.items() for word in (f"--{name}", *map(str, value)))]


def results(folder: Path):
    return [from_json(each) for each in json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))]


def test_eval_of_two_models_leaves_samples_results_table_and_plots(models, folder, capsys, monkeypatch):
    argv = words(folder, model_name_or_path=[models / name for name in MODELS])
    main(argv)
    printed = capsys.readouterr().out
    out = folder / "out"
    table = (out / "results.md").read_text(encoding="utf-8")
    assert table.strip() in printed and "| before | 0 (greedy) | 1 |" in table and "| after | 0.5 | 4 |" in table
    assert "pass@4" in table and "pass@8" not in table and "95 % bootstrap" in table
    first = results(folder)
    assert [each.name for each in first] == list(MODELS) and first[0] != first[1]
    assert all(list(each.sampled) == [0.5, 1.0] and each.num_prompts == 4 for each in first)
    assert f"{first[0].sampled[1.0].entropy.value:.3f}" in table
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")

    # complete: no model is loaded, for another checker neither
    monkeypatch.setattr(problems, "load_model", lambda *_: pytest.fail("loaded a model"))
    main(argv)
    assert results(folder) == first
    main([*argv, "--checker", "regex:.", "--k", "2"])
    assert results(folder)[0].greedy.accuracy.value == 1.0 and list(results(folder)[0].sampled[1.0].pass_at) == [2]


def test_eval_goes_on_and_loads_only_what_is_missing(models, folder, monkeypatch):
    argv = words(folder, model_name_or_path=[models / name for name in MODELS])
    main(argv)
    first, path = results(folder), folder / "out" / "samples-after.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    loaded, load = [], problems.load_model
    monkeypatch.setattr(problems, "load_model", lambda name, kwargs: loaded.append(name) or load(name, kwargs))
    main(argv)
    assert loaded == [str(models / "after")] and path.read_bytes() == whole and results(folder) == first


def test_eval_scores_ready_made_samples_beside_a_model(models, folder):
    samples = [{"prompt": record["prompt"], "completions": [record["answer"], "9", "x"]} for record in PROMPTS]
    write(folder / "vllm.jsonl", samples)
    both = {"model_name_or_path": models / "before", "samples": folder / "vllm.jsonl"}
    main(words(folder, **both, names=["mine", "theirs"]))
    mine, theirs = results(folder)
    assert (mine.name, theirs.name) == ("mine", "theirs") and theirs.greedy is None
    scores = theirs.sampled[1.0]
    assert scores.accuracy.value == pytest.approx(1 / 3) and scores.num_samples == 3 and scores.entropy is None
    assert list(scores.pass_at) == [1] and scores.distinct_right.value == 1
    main(words(folder, samples=[folder / "out" / "samples-mine.jsonl"], names=["mine"]))
    assert results(folder) == [mine]  # with the entropies


def test_eval_stop_cuts_ready_made_samples_at_a_line_break(folder):
    write(folder / "vllm.jsonl", [{"prompt": r["prompt"], "completions": [f"{r['answer']}\nQ: 9"]} for r in PROMPTS])
    options = {"samples": folder / "vllm.jsonl", "checker": "regex:[0-9]$"}
    argv = words(folder, **options)
    main([*argv, "--stop=--", r"--stop=\nQ"])
    assert results(folder)[0].sampled[1.0].accuracy.value == 1
    main([*words(folder, **{**options, "checker": "regex:9$"}), "--stop", r"\\nQ"])  # a backslash, n, Q: not there
    assert results(folder)[0].sampled[1.0].accuracy.value == 1


def test_eval_counts_completions_that_a_function_cannot_judge(folder, capsys):
    (folder / "checks.py").write_text(
        "import os\n"
        "def check(prompt, completion, record):\n"
        "    if completion == '8': os._exit(0)\n"
        "    if completion == '9': exit()\n"
        "    return {'0': True, '': False}[completion]\n"
    )
    write(folder / "vllm.jsonl", [{"prompt": r["prompt"], "completions": ["0", "8", "9", "x"]} for r in PROMPTS])
    options = {"samples": folder / "vllm.jsonl", "checker": f"{folder}/checks.py:check", "checker_timeout": 5}
    main(words(folder, **options))
    (evaluation,) = results(folder)
    assert evaluation.sampled[1.0].accuracy.value == 0.25
    assert {(each.completions, each.first_prompt) for each in evaluation.unjudged} == {(4, 1)}
    line = "vllm: 12 of 16 completions could not be judged, and count as wrong: 4 × the checker ended its process (exit"
    assert line in capsys.readouterr().out and line in (folder / "out" / "results.md").read_text(encoding="utf-8")
    (folder / "checks.py").write_text("def check(prompt, completion, record): return record['label'] == completion\n")
    message = refused(words(folder, **options), capsys)
    assert "raised KeyError('label')" in message and "the same on each of" in message


def test_eval_reads_other_columns_and_limits(models, folder):
    main(words(folder, model_name_or_path=models / "before", prompt_column="question", limit=2, temperatures=[]))
    (evaluation,) = results(folder)
    assert evaluation.num_prompts == 2 and evaluation.sampled == {} and evaluation.greedy.num_samples == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --model_name_or_path or --samples"),
        ({"model_name_or_path": ["/nowhere/model"]}, "/nowhere/model"),
        ({"prompts": "/nowhere/prompts.jsonl"}, "/nowhere/prompts.jsonl: no such file"),
        ({"prompt_column": "text"}, "has no column 'text', it has prompt, answer, question: --prompt_column"),
        ({"answer_column": "label"}, "prompt 1: "),
        ({"checker": "gsm9k"}, "no such checker: 'gsm9k'"),
        ({"checker": "unit_tests"}, "--run_code"),
        ({"k": [1, 5]}, "pass@5 needs 1 <= k <= num_samples, and num_samples = 4"),
        ({"temperatures": [-1]}, "a temperature must be a number from 0 on, got -1"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"max_new_tokens": 300}, "more than the 256 positions of the model"),
        ({"names": ["a", "b"]}, "--names gives 2 names to 1 models"),
        ({"samples": ["/nowhere/samples.jsonl"]}, "/nowhere/samples.jsonl"),
    ],
)
def test_eval_refuses_with_the_value_and_the_way_out(options, message, models, folder, capsys):
    if options:
        options = {"model_name_or_path": [models / "before"], **options}
    assert message in refused(words(folder, **options), capsys)


def test_eval_refuses_names_that_collide(models, folder, capsys):
    message = refused(words(folder, model_name_or_path=[models / "before", f"{models}/./before"]), capsys)
    assert "would both be called before" in message and "--names" in message


def test_eval_refuses_an_output_folder_of_other_settings(models, folder, capsys):
    options = {"model_name_or_path": models / "before", "temperatures": []}
    main(words(folder, **options))
    before = (folder / "out" / "samples-before.jsonl").read_bytes()
    for name, value in (("seed", 3), ("max_new_tokens", 5), ("limit", 2), ("dtype", "bfloat16")):
        message = refused(words(folder, **options, **{name: value}), capsys)
        assert "samples-before.jsonl holds samples with" in message and "another output folder" in message
    assert (folder / "out" / "samples-before.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ('{"prompt": null, "answer": "1"}\n', "record 1: prompt is neither"), ("{\n", "line 1")],
)
def test_eval_refuses_prompts_that_are_none(content, message, models, folder, capsys):
    (folder / "prompts.jsonl").write_text(content)
    message_of = refused(words(folder, model_name_or_path=models / "before"), capsys)
    assert message in message_of and "prompts.jsonl" in message_of


def test_eval_help_teaches(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["eval", "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    for word in ("--temperatures", "gsm8k", "unit_tests", "vllm.jsonl", '"completions"', "goes on where it was"):
        assert word in text


def test_eval_without_matplotlib_has_all_but_the_plot(models, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (folder / "out").mkdir()
    (folder / "out" / "results.png").write_text("of an earlier call")
    main(words(folder, model_name_or_path=models / "before", temperatures=[]))
    written = {path.name for path in (folder / "out").iterdir()}
    assert written == {"results.json", "results.md", "samples-before.jsonl"}
    printed = capsys.readouterr()
    assert "results.png" not in printed.out and "results.png is not drawn" in printed.err
    assert "pip install 'hdpo[train]'" in printed.err


def test_eval_without_sacrebleu_is_refused_at_the_door(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    message = refused(words(folder, model_name_or_path="/nowhere", prompts="/nowhere.jsonl"), capsys)
    assert "needs sacrebleu: pip install" in message and "--no_self_bleu" in message


def test_eval_interrupted_says_what_is_drawn_and_goes_on(models, folder, monkeypatch, capsys):
    argv = words(folder, model_name_or_path=[models / name for name in MODELS], temperatures=[1.0])
    with monkeypatch.context() as patched:
        draw, calls = Sampler._draw, iter(range(100))

        def interrupted(sampler, *args):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return draw(sampler, *args)

        patched.setattr(Sampler, "_draw", interrupted)
        with pytest.raises(SystemExit, match="130"):
            main(argv)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == (
        f"hdpo-train eval: interrupted; {folder / 'out'} has 12 samples of before and 0 samples of after, and the same "
        "command goes on from there"  # 4 greedy ones, and a batch of 8
    )
    main(argv)
    assert [each.name for each in results(folder)] == list(MODELS)


def test_eval_refuses_k_of_more_samples_than_a_file_has(folder, capsys):
    write(folder / "vllm.jsonl", [{"prompt": record["prompt"], "completions": ["1", "2"]} for record in PROMPTS])
    message = refused(words(folder, samples=folder / "vllm.jsonl", k=[1, 4]), capsys)
    assert "vllm.jsonl has 2 samples of a prompt: too few for --k 4" in message
