"""What a user can get wrong on the command line, in every command: one paragraph, exit code 2, never a traceback."""

import gc
import os
import re
import shutil
import sys

import pytest
import torch
from safetensors import SafetensorError

from hdpo_train.cli.errors import run_command
from hdpo_train.cli.main import main
from hdpo_train.options import parse_options
from hdpo_train.run.output_dir import check_output_dir
from tests.train.tiny import make_model

EVAL = "eval --samples s.jsonl --prompts p.jsonl --checker choice --output_dir out"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder, but for a file and a folder to be mistaken for something else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()


def refused(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    everything = capsys.readouterr().err
    assert exit.value.code == 2 and "Traceback" not in everything, everything
    found = re.search(r"^hdpo-train.*", everything, re.DOTALL | re.MULTILINE)  # below progress bars
    assert found and "\n\n" not in found[0], everything
    return found[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evl", "no command 'evl'; did you mean 'eval'?"),
        ("evl --help", "did you mean 'eval'?"),
        ("data.jsonl --alpha 1", "no command 'data.jsonl'; there are train, plan, pairs, eval"),
        ("--alhpa 1", "no option --alhpa; did you mean '--alpha'?"),
        ("train --alhpa 1", "no option --alhpa; did you mean '--alpha'?"),
        ("train --alph 1", "did you mean '--alpha'?"),  # no abbreviations
        ("plan --max_lenght=64", "hdpo-train plan: no option --max_lenght; did you mean '--max_length'?"),
        ("eval --promts p.jsonl", "hdpo-train eval: no option --promts; did you mean '--prompts'?"),
        ("sweep --num_sample 2", "hdpo-train sweep: no option --num_sample; did you mean '--num_samples'?"),
        ("sweep --learning_rat 1", "did you mean '--learning_rate'?"),
        ("quickstart --sed 1", "hdpo-train quickstart: no option --sed; did you mean '--seed'?"),
        ("--alpha 1 2", "'2' belongs to no option"),
        ("sweep stray", "'stray' belongs to no option"),
        ("train", "--model_name_or_path and --dataset_name are needed"),
        ("--max_steps 1.5", "--max_steps/--max-steps: invalid int value: '1.5'"),
        ("--max_length none", "invalid int value: 'none'"),
        ("--alpha", "--alpha: expected one argument"),
        ("--save_strategy nope", "no such choice: 'nope'; did you mean 'no'?"),
        ("--optim adamw_torhc", "did you mean 'adamw_torch'?"),
        ("--liger_kernel_config [1]", "a mapping in JSON is needed"),
        ("--model_init_kwargs {a", "--model_init_kwargs/--model-init-kwargs: a mapping in JSON is needed"),
        ("--lr_scheduler_kwargs 5", "a mapping in JSON is needed, like {\"key\": 1}; got '5'"),
        ("--deepspeed {a", "--deepspeed: a mapping in JSON is needed"),
        ("--deepspeed no.json --use_cpu", "deepspeed"),
        ("--use_cpu --output_dir file/out", "--output_dir file/out: "),
        ("one.yaml two.yml", "one YAML file, not from one.yaml and two.yml"),
        ("folder.yaml", "folder.yaml cannot be read: No such file"),
        ("plan", "hdpo-train plan --model_name_or_path MODEL"),
        ("plan --alpha 1", "needs --model_name_or_path"),
        ("sweep --alpha 1,,2", "--alpha: numbers with commas between them"),
        ("sweep --output_dir file", "file is a file"),
        ("quickstart --output_dir file/sub", "is a file, not a folder"),
        ("quickstart --seed x", "--seed: invalid int value: 'x'"),
        (EVAL + " --k", "--k: expected at least one argument"),
        (EVAL + " --output_dir file", "file is a file, not a folder"),
        (EVAL + " --output_dir=", "--output_dir is empty: give it a value, or leave it out"),
        (EVAL + " --seed -1", "seed must be a whole number from 0 on, got -1"),
        (EVAL + " --num_samples 0", "num_samples must be a positive whole number, got 0"),
        (EVAL + " --temperatures nan", "a temperature must be a number from 0 on, got nan"),
        ("quickstart --alpha 0", "alpha must be a positive number, got 0"),
        ("quickstart --alpha 1.0000001", "--alpha is compared with α = 1"),
        ("quickstart --seed -1", "--seed must be from 0 to 4294967295, got -1"),
        (EVAL + " --dtype float23", "no such choice: 'float23'; did you mean 'float32'?"),
        (EVAL + " --dtype f", "no such choice: 'f'; choose from auto, float32"),
        (EVAL, "p.jsonl: no such file"),
        (EVAL + " --names a b", "--names gives 2 names to 1 models"),
        ("eval", "the following arguments are required: --prompts, --checker, --output_dir"),
    ],
)  # fmt: skip
def test_main_refuses_in_one_paragraph(line, words, capsys):
    assert words in refused(line.split(), capsys)


@pytest.mark.parametrize(
    "command", [["--run_name", ""], [*EVAL.split(), "--names", "a", ""], ["sweep", "--checker", ""]]
)
def test_main_refuses_an_empty_word(command, capsys):
    """As of an unset variable of a shell."""
    assert f"{command[-2]} is empty" in refused(command, capsys)


def test_main_names_the_nearest_checker(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    assert "no such checker: 'chioce'; did you mean 'choice'?" in refused(
        [*EVAL.split(), "--checker", "chioce"], capsys
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("whole")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "[]", "can be loaded from 'model'"),
        ("config.json", "[" * 100_000, "can be loaded from 'model' (RecursionError: "),
        (
            "config.json",
            '{"model_type": "t5"}',
            "no model can be loaded from 'model' (Unrecognized configuration class",
        ),
        ("config.json", '{"model_type": "llama", "dtype": "float7"}', "has no attribute 'float7'"),
        ("config.json", '{"model_type": "llama", "hidden_size": "big"}', "expected int, got str"),
        ("model.safetensors", "", "no model can be loaded from 'model' (SafetensorError: "),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan", "eval"])
def test_main_names_the_folder_of_a_damaged_model(command, name, content, words, model, tmp_path, capsys):
    gc.collect()  # a DeepSpeed config of another test, in a cycle, would have a say in how models are loaded
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / name).write_text(content)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Say sun:", "chosen": " sun", "rejected": " moon", "answer": "A"}\n')
    options = {
        "train": "--dataset_name p.jsonl --use_cpu --output_dir out",
        "plan": "--use_cpu",
        "eval": "--prompts p.jsonl --checker choice --output_dir out --no_self_bleu",
    }
    if (command, name) == ("plan", "model.safetensors"):
        return  # a plan reads no weights
    message = refused([command, "--model_name_or_path", "model", *options[command].split()], capsys)
    assert words in message and len(message) < 2000


def test_main_says_that_a_model_is_neither_here_nor_on_the_hub(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(["plan", "--use_cpu", "--model_name_or_path", "./typo"], capsys)
    assert "'./typo' is no folder here, and no config of that name could be had from the hub" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("alhpa: 1", "no such option: alhpa; did you mean 'alpha'?"),
        ("use_cpu: true\nalpha: [1, 2]", "line 2: --alpha takes one value, got the list [1, 2]"),
        ("beta: {a: 1}", "line 1: --beta takes no mapping"),
        ("beta:", "line 1: --beta has no value"),
        ("beta: 1\nbeta: 2", "beta is given twice"),
        ("max_steps: 1e3", "line 1: argument --max_steps/--max-steps: invalid int value: '1e3'"),
        ("use_cpu: maybe", "line 1: argument --use_cpu"),
        ("lora_target_modules: [[a]]", "--lora_target_modules takes a list of words"),
        ("model_init_kwargs: !!python/object:os.system {}", "line 1: could not determine a constructor"),
        ("", "must hold options as 'name: value' lines"),
        ("- alpha", "must hold options as 'name: value' lines"),
        ("alpha:\t- 1\n\tx", "cannot be read: while scanning"),
        ("a: " + "[" * 1000, "cannot be read: maximum recursion depth"),
        (b"\xff\xfe", "cannot be read: 'utf-8' codec"),
    ],
)
def test_main_names_the_file_and_the_line_of_an_option(content, words, tmp_path, capsys):
    (tmp_path / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(["run.yaml"], capsys)
    assert words in message and message.startswith("hdpo-train: run.yaml")


def test_options_of_a_file_are_read_as_they_are_written(tmp_path):
    lines = {
        "save_strategy": "no", "use_cpu": "on", "max_length": "null", "report_to": "[none]", "target_entropy": "0.9",
        "learning_rate": "5e-7", "model_init_kwargs": "{a: 1}", "lora_target_modules": "q_proj", "use_peft": "yes",
        "run_name": "yes",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    script, args = parse_options(["run.yaml", "--learning_rate", "1e-7"])
    assert (args.save_strategy, args.use_cpu, args.max_length, args.report_to) == ("no", True, None, [])
    assert (args.learning_rate, args.model_init_kwargs, args.run_name) == (1e-7, {"a": 1}, "yes")
    assert script.lora_target_modules == ["q_proj"] and args.target_entropy == "0.9"


def test_options_take_none_and_bare_flags():
    options = ["--use_cpu", "--max_length", "None", "--packing", "--run_name", "None", "--resume_from_checkpoint"]
    _, args = parse_options([*options, "--model_init_kwargs", '{"rope": false}', "--optim_target_modules", "all"])
    assert args.max_length is None and args.run_name is None and args.packing is True
    assert args.resume_from_checkpoint == "true" and args.model_init_kwargs == {"rope": False}
    assert args.optim_target_modules == "all"  # not ["all"]: for some options a word is more than a list of one
    assert parse_options(["--use_cpu", "--packing", "None"])[1].packing is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", "trains a causal language model"),
        ("plan", "what a step will need"),
        ("sweep", "can temperature alone do it?"),
        ("eval", "what models can do on prompts"),
        ("quickstart", "h-dpo from nothing"),
    ],
)
@pytest.mark.parametrize("flags", ["--help", "-h --seed", "--seed 1 --help"])
def test_main_help_is_of_the_command(command, flags, words, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), *flags.split()])
    assert exit.value.code == 0 and words in " ".join(capsys.readouterr().out.lower().split())


def raising(error: BaseException):
    def command(argv: list[str]) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SafetensorError("header too short"), "header too short"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried …"), "raise --gradient_accumulation_steps"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "lower --dataloader_num_workers"),
        (ModuleNotFoundError("No module named 'peft.x'", name="peft.x"), "package peft is not installed: pip"),
        (ImportError("Using `bitsandbytes`\n\nneeds it"), "Using `bitsandbytes` needs it"),
        (ValueError("Caught … in …\nOriginal Traceback (most …)\n  File …\nValueError: bad"), "ValueError: bad"),
        (OSError("first\n\n\nsecond"), "first\nsecond"),
        (FloatingPointError(), "FloatingPointError"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_run_command_says_what_a_user_can_cause(error, words, capsys):
    with pytest.raises(SystemExit) as exit:
        run_command("hdpo-train x", raising(error), [])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.startswith("hdpo-train x: ") and words in message
    assert "Traceback (" not in message and "Original" not in message and "\n\n" not in message


@pytest.mark.parametrize(
    "error",
    [
        TypeError("unsupported operand"), KeyError("name"), RuntimeError("shape '[3]' is invalid"), IndexError(),
        ModuleNotFoundError("No module named 'hdpo_train.foo'", name="hdpo_train.foo"), AssertionError(),
        ImportError("cannot import name 'x' from 'transformers'", name="transformers"), RecursionError(),
    ],
    ids=repr,
)  # fmt: skip
def test_run_command_leaves_a_bug_its_traceback(error):
    with pytest.raises(type(error)):
        run_command("hdpo-train", raising(error), [])


@pytest.mark.parametrize(("variable", "argv"), [("1", []), ("", ["--log_level", "debug"]), ("", ["--log_level=debug"])])
def test_run_command_shows_the_traceback_when_asked(variable, argv, capsys, monkeypatch):
    monkeypatch.setenv("HDPO_TRACEBACK", variable)
    with pytest.raises(SystemExit, match="2"):
        run_command("hdpo-train", raising(OSError("disk")), argv)
    message = capsys.readouterr().err
    assert "Traceback" in message and message.endswith("hdpo-train: disk\n")


def test_run_command_ends_with_130_after_an_interruption(capsys):
    with pytest.raises(SystemExit) as exit:
        run_command("hdpo-train eval", raising(KeyboardInterrupt("stopped at 3 of 5")), [])
    assert exit.value.code == 130 and capsys.readouterr().err == "\nhdpo-train eval: stopped at 3 of 5\n"


def test_quickstart_interrupted_says_that_it_starts_from_the_beginning(monkeypatch, capsys):
    monkeypatch.setattr("hdpo_train.cli.quickstart.run", lambda folder, settings: raising(KeyboardInterrupt())([]))
    with pytest.raises(SystemExit, match="130"):
        main(["quickstart", "--output_dir", "folder"])
    assert "starts from the beginning, and replaces what is in folder" in capsys.readouterr().err


def test_run_command_is_quiet_when_nobody_reads_on(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", pipe := open(writing, "w"))  # noqa: SIM115
    with pytest.raises(SystemExit) as exit:
        run_command("hdpo-train", lambda argv: print("a table"), [])
    print("more")
    pipe.close()  # as Python does at its end: goes nowhere, and raises nothing
    assert exit.value.code == 141 and capsys.readouterr().err == ""


def test_check_output_dir_refuses_what_cannot_be_written_to(monkeypatch):
    assert check_output_dir("folder/new/deep") and check_output_dir("folder")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"--output_dir folder/new: you may not write to .*folder; choose"):
        check_output_dir("folder/new")
