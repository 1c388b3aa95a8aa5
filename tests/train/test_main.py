"""The command line, in this process: flags, YAML, resuming, and messages a person can act on."""

import gzip
import io
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hdpo_train.cli.main import COMMANDS, main
from hdpo_train.options import KINDS
from hdpo_train.run.report import METRICS_FILE, REPORT_FILE, read_metrics
from hdpo_train.trainer import HDPOTrainer
from tests.train.commands import refused, write
from tests.train.tiny import make_model, make_records


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A model with its tokenizer, and pairs in a JSONL file."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write(tmp_path / "pairs.jsonl", make_records())
    return tmp_path


def arguments(folder: Path, **options) -> list[str]:
    values = {
        "model_name_or_path": folder / "model", "dataset_name": folder / "pairs.jsonl", "output_dir": folder / "out",
        "ref_cache_dir": folder / "reference", "use_cpu": True, "max_steps": 2, "logging_steps": 1,
        "per_device_train_batch_size": 4, "alpha": 0.9, "disable_tqdm": True,
    }  # fmt: skip
    return [word for name, value in {**values, **options}.items() for word in (f"--{name}", str(value))]


def test_main_trains_and_leaves_a_model_metrics_and_plots(folder, capsys):
    main(arguments(folder))
    assert str(folder / "out") in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(folder / "out")
    assert {METRICS_FILE, REPORT_FILE, "tokenizer.json"} <= {path.name for path in (folder / "out").iterdir()}
    assert read_metrics(folder / "out")[0]["alpha"] == 0.9


def test_main_reads_yaml_and_lets_flags_override_it(folder):
    options = arguments(folder, learning_rate="5e-7", alpha=0.8)
    lines = [f"{name.removeprefix('--')}: {value}" for name, value in zip(options[::2], options[1::2], strict=True)]
    (folder / "run.yaml").write_text("\n".join(lines))
    main([str(folder / "run.yaml"), "--alpha", "0.7", "--max_steps", "1"])
    start, *lines = read_metrics(folder / "out")
    assert start["alpha"] == 0.7
    assert [line["learning_rate"] for line in lines if "loss" in line] == [5e-7]


def test_main_resumes_with_a_bare_flag(folder):
    main(arguments(folder, save_steps=1, lr_scheduler_type="constant"))
    main([*arguments(folder, max_steps=3, lr_scheduler_type="constant"), "--resume_from_checkpoint"])
    assert [line["step"] for line in read_metrics(folder / "out") if "loss" in line] == [1, 2, 3]


def test_main_trains_lora_that_loads_with_auto_classes(folder):
    pytest.importorskip("peft")
    main([*arguments(folder, learning_rate=1e-2), "--use_peft", "--lora_r", "4"])
    AutoModelForCausalLM.from_pretrained(folder / "out")


def test_main_trains_with_a_sampled_gradient_beside_options_of_like_names(folder):
    options = {"gradient": "sampled", "epsilon": 0.01, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    main(arguments(folder, **options, torch_compile=True, torch_compile_backend="eager"))
    assert len([line for line in read_metrics(folder / "out") if "loss" in line]) == 2


def test_main_evaluates_on_another_file(folder):
    write(folder / "eval.jsonl", make_records(5, seed=2))
    main(arguments(folder, eval_dataset_name=folder / "eval.jsonl", eval_strategy="steps", eval_steps=2))
    assert any("eval_rewards/margins" in line for line in read_metrics(folder / "out"))


def test_main_reads_gzip_and_parquet(folder):
    from datasets import Dataset

    with gzip.open(folder / "pairs.jsonl.gz", "wt") as file:
        file.write((folder / "pairs.jsonl").read_text())
    Dataset.from_list(make_records()).to_parquet(str(folder / "pairs.parquet"))
    for i, name in enumerate(("pairs.jsonl.gz", "pairs.parquet")):
        main(arguments(folder, dataset_name=folder / name, max_steps=1, output_dir=folder / f"out{i}"))
    assert read_metrics(folder / "out0")[1]["loss"] == read_metrics(folder / "out1")[1]["loss"]


def test_help_has_the_options_that_most_runs_need_and_help_all_has_every_one(capsys):
    texts = []
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit, match="0"):
            main(["train", flag])
        texts.append(capsys.readouterr().out)
    short, long = (re.findall(r"^  --(\w+)", text, re.MULTILINE) for text in texts)
    assert {"alpha", "dataset_name", "output_dir"} <= set(short) and len(short) == 15 and "sharpens" in texts[0]
    assert {field.name for kind in KINDS for field in fields(kind) if field.init} - {"logging_nan_inf_filter"} == {
        *long
    }
    assert len(set(long)) == len(long) and set(short) <= set(long)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h", "--seed"]])
def test_the_commands_are_listed_without_importing_torch(argv):
    code = f"import sys; from hdpo_train.cli.main import main; main({argv}); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert f"\n  {command} " in result.stdout


def test_main_names_missing_columns_and_the_file(folder, capsys):
    write(folder / "bad.jsonl", [{"prompt": "a", "answer": "b"}])
    message = refused(arguments(folder, dataset_name=folder / "bad.jsonl"), capsys)
    assert "bad.jsonl" in message and "no column chosen and no column rejected" in message and "answer" in message


def test_main_counts_bad_records_with_their_lines(folder, capsys):
    bad = [{"prompt": "x", "chosen": "same", "rejected": "same"}, {"prompt": "x", "chosen": "", "rejected": "y"}]
    write(folder / "bad.jsonl", [*make_records(3), *bad])
    message = refused(arguments(folder, dataset_name=folder / "bad.jsonl"), capsys)
    assert "bad.jsonl" in message and "2 of the 5 records" in message and "--on_bad_record drop" in message
    assert "record 4" in message and "record 5" in message
    main(arguments(folder, dataset_name=folder / "bad.jsonl", on_bad_record="drop"))
    assert read_metrics(folder / "out")[0]["pairs"] == 3


def test_main_names_the_line_of_malformed_json(folder, capsys):
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    message = refused(arguments(folder, dataset_name=folder / "bad.jsonl"), capsys)
    assert "bad.jsonl, line 2" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0}, "alpha must be from 1e-9 to 1e9 (what fp32 can hold), got 0.0"),
        ({"beta": -1}, "beta must be from 1e-9 to 1e9 (what fp32 can hold), got -1.0"),
        ({"gradient": "sampled", "epsilon": 0.001}, "epsilon >= 0.00336"),
        ({"gradient": "sampled", "epsilon": 2}, "epsilon must be in (0, 0.5], got 2.0"),
        ({"dataset_name": "/nowhere/pairs.jsonl"}, "/nowhere/pairs.jsonl"),
        ({"model_name_or_path": "/nowhere/model"}, "/nowhere/model"),
        ({"resume_from_checkpoint": "/nowhere/checkpoint-1"}, "/nowhere/checkpoint-1: no such folder"),
        ({"eval_strategy": "steps"}, "--eval_dataset_name"),
        (
            {"eval_dataset_name": "more.jsonl"},
            "--eval_dataset_name would never be evaluated: say when by",
        ),
        ({"hub_model_id": "me/model"}, "--hub_model_id me/model has no effect without --push_to_hub"),
        ({"lora_r": 4}, "lora_r=4 has no effect without use_peft"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a positive whole number, got 0"),
        ({"alpha": 1e308}, "alpha must be from 1e-9 to 1e9 (what fp32 can hold), got 1e+308"),
        ({"report_to": "carrier_pigeon"}, "report_to='carrier_pigeon' is not known"),
    ],
)
def test_main_refuses_with_the_value_and_the_way_out(options, words, folder, capsys):
    assert words in refused(arguments(folder, **options), capsys)


def test_main_refuses_a_model_folder_without_tokenizer(folder, capsys):
    for path in (folder / "model").glob("*token*"):
        path.unlink()
    message = refused(arguments(folder), capsys)
    assert "no tokenizer can be loaded from" in message and "save_pretrained" in message


def test_main_refuses_an_output_folder_of_another_run(folder, capsys):
    main(arguments(folder, max_steps=1))
    message = refused(arguments(folder), capsys)
    assert "holds another run" in message and "--overwrite_output_dir" in message


def test_main_refuses_unknown_options(folder, capsys):
    assert "--alhpa" in refused([*arguments(folder), "--alhpa", "1"], capsys)
    (folder / "run.yaml").write_text("alhpa: 1\n")
    assert "no such option: alhpa" in refused([str(folder / "run.yaml")], capsys)


def test_main_needs_model_and_data(capsys):
    assert "--model_name_or_path and --dataset_name are needed" in refused(["--alpha", "0.9", "--use_cpu"], capsys)


def test_main_never_runs_remote_code_unasked(folder, capsys, monkeypatch):
    (folder / "model" / "evil.py").write_text("raise SystemExit('remote code ran')\n")
    config = json.loads((folder / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = "evil"
    (folder / "model" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the terminal"))
    message = refused(arguments(folder), capsys)
    assert "trust_remote_code" in message and "remote code ran" not in message


def test_main_interrupted_says_where_the_run_stands(folder, capsys, monkeypatch):
    step = HDPOTrainer.training_step

    def interrupt(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(HDPOTrainer, "training_step", interrupt)
    with pytest.raises(SystemExit) as exit:
        main(arguments(folder, max_steps=4, save_steps=2))
    assert exit.value.code == 130
    whole = folder / "out" / "checkpoint-2"
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        f"hdpo-train: interrupted at step 3 of 4; {whole} is whole: --resume_from_checkpoint true goes on from it"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_main_goes_on_where_stdout_has_no_greek(encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    main([])
    assert rb"several \u03b1 and seeds" in written.getvalue()
