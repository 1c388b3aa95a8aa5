"""The command line: hdpo-train (= python -m hdpo_train; accelerate launch -m hdpo_train …)."""

import copy
import gc
import importlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from hdpo_train.command_line import UsageError, check_output_dir, did_you_mean, end, run_command
from hdpo_train.config import HDPOConfig, PlanConfig, ScriptArguments
from hdpo_train.data.tokenize import load_records
from hdpo_train.model.loading import (
    adapter_configs,
    add_adapter,
    import_peft,
    load_model,
    load_tokenizer,
    reading,
    where_from,
)
from hdpo_train.options import TrainingParser, is_file_of_options, parse_options
from hdpo_train.run.report import METRICS_FILE, REPORT_FILE
from hdpo_train.run.resuming import taken_output_dir
from hdpo_train.trainer import HDPOTrainer

_EXAMPLES = """\
Trains a causal language model on preference pairs with H-DPO: DPO with control over entropy by one number, alpha.

  hdpo-train                                          the quickstart: task, model, pairs, training and a before/after
                                                      table on this machine in a few minutes, no download
  hdpo-train --model_name_or_path MODEL --dataset_name pairs.jsonl --alpha 0.95 --output_dir out
                                                      train; MODEL and data are local paths or hub ids
  hdpo-train run.yaml --learning_rate 5e-7            the options of a YAML file, some overridden
  hdpo-train … --resume_from_checkpoint               go on from the last whole checkpoint in output_dir, or start if
                                                      there is none: the same command after any crash
  hdpo-train sweep --alpha 0.8,0.9,1.1 --seeds 3      several α and seeds, each evaluated, and one report (sweep --help)
  hdpo-train plan …                                   the same options: what memory and time a step will need; of the
                                                      model only its config is read, and no data
  hdpo-train pairs …                                  preference pairs of a model's own answers to a file of
                                                      prompts, judged by a program (hdpo-train pairs --help)
  hdpo-train eval …                                   accuracy, pass@k, diversity and entropy of models on a file of
                                                      prompts (hdpo-train eval --help)

Records: {"prompt", "chosen", "rejected"} as strings or chat messages; the prompt may be left out where both completions
begin with it. A run leaves the model, metrics.jsonl and report.png in output_dir.
"""
_PLAN = """\
What a step will need, by the options of a run: memory by kind, and seconds. Or, with --fit, the longest pair of which a
step fits, what takes the memory there, and which option would lengthen it. Of the model only its config is read, and no
data.

  hdpo-train plan --model_name_or_path MODEL --max_length 2048 --per_device_train_batch_size 4
  hdpo-train plan --model_name_or_path MODEL --gradient_checkpointing True --on cuda --fit 79GiB
"""
_COMMANDS_OF_THEIR_OWN = {  # each module has main(argv)
    "pairs": "hdpo_train.cli.pairs",
    "eval": "hdpo_train.cli.eval",
    "sweep": "hdpo_train.sweep.run",
    "quickstart": "hdpo_train.quickstart",
}


def main(argv: list[str] | None = None) -> None:
    """A command of the command line. Exit codes: 2 for an error that is said in words, 130 after Ctrl-C,
    143 after a SIGTERM that left a checkpoint."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in Latin-1 or ASCII there is no α: the program goes on with \u03b1
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        name = "quickstart"
    elif argv[0].startswith("-") or is_file_of_options(argv[0]):
        name = "train"
    else:
        name = argv.pop(0)
    commands = {
        "train": _train_command,
        "plan": _plan_command,
        **{each: _load(each) for each in _COMMANDS_OF_THEIR_OWN},
    }
    if name not in commands:
        near = did_you_mean(name, commands)
        end("hdpo-train", f"no command {name!r}{near or '; there are ' + ', '.join(commands)}", 2)
    run_command("hdpo-train" if name == "train" else f"hdpo-train {name}", commands[name], argv)


def _load(name: str) -> Callable[[list[str]], Any]:
    return lambda argv: importlib.import_module(_COMMANDS_OF_THEIR_OWN[name]).main(argv)


def _train_command(argv: list[str]) -> None:
    train(*parse_options(argv, TrainingParser(description=_EXAMPLES)))
    if dist.is_initialized():
        # The group outlives this in the trainer's cycles; a thread of gloo that meets Python's end ends in SIGABRT.
        gc.collect()
        dist.destroy_process_group()


def _plan_command(argv: list[str]) -> None:
    if not argv:
        raise UsageError(
            "plan needs the options of a run: hdpo-train plan --model_name_or_path MODEL --max_length 2048 …"
        )
    script, args = parse_options(argv, TrainingParser("hdpo-train plan", _PLAN, (ScriptArguments, PlanConfig)))
    plan(script, cast(PlanConfig, args))


def train(script: ScriptArguments, args: HDPOConfig) -> HDPOTrainer:
    """A run of the command line, from names to a saved model."""
    check_output_dir(str(args.output_dir))
    with taken_output_dir(args, [script.model_name_or_path]):
        return _train(script, args)


def _train(script: ScriptArguments, args: HDPOConfig) -> HDPOTrainer:
    trainer = make_trainer(script, args)
    if trainer.is_world_process_zero():
        start = trainer.start
        print(
            f"{start['pairs']} pairs. Margin before training (0 for α = 1): mean {start['initial_margin']:+.3f}, "
            f"largest {start['initial_margin_largest']:.3f}"
        )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(str(args.output_dir))
        if trainer.entropy_control is not None and trainer.state.log_history:  # else it had ended before
            print(trainer.entropy_control.describe())
        print(f"model: {folder}   metrics: {folder / METRICS_FILE}   plots: {folder / REPORT_FILE}")
    return trainer


def make_trainer(script: ScriptArguments, args: HDPOConfig) -> HDPOTrainer:
    """Model and data loaded by their names, reference log-probs computed or read."""
    if script.model_name_or_path is None or script.dataset_name is None:
        raise ValueError(
            "--model_name_or_path and --dataset_name are needed to train (with no option at all: the quickstart)"
        )
    if args.hub_model_id is not None and not args.push_to_hub:
        raise ValueError(f"--hub_model_id {args.hub_model_id} has no effect without --push_to_hub")
    set_seed(args.seed)
    train_records, eval_records = load_data(script, args)
    remote_code = {"trust_remote_code": script.trust_remote_code}
    tokenizer = load_tokenizer(script.model_name_or_path, **remote_code)
    init_kwargs: dict[str, Any] = {"dtype": script.dtype, **remote_code}
    if script.attn_implementation:
        init_kwargs["attn_implementation"] = script.attn_implementation
    if isinstance(args.model_init_kwargs, dict):
        init_kwargs |= args.model_init_kwargs
        args = copy.copy(args)
        args.model_init_kwargs = None  # the model takes them along
    model = load_model(script.model_name_or_path, init_kwargs)
    adapters = adapter_configs(model)
    for adapter in adapters.values():
        _check_lora(script, adapter, args.disable_dropout)
    return HDPOTrainer(
        model=model,
        args=args,
        train_dataset=train_records,
        eval_dataset=eval_records,
        processing_class=tokenizer,
        peft_config=_lora(script) if script.use_peft and not adapters else None,
    )


def load_data(script: ScriptArguments, args: HDPOConfig) -> tuple[Dataset, Dataset | None]:
    """Records to train and to evaluate on."""
    train_records = load_records(str(script.dataset_name), script.dataset_train_split, script.dataset_config)
    eval_records = None
    if script.eval_dataset_name or script.dataset_test_split:
        if args.eval_strategy == "no" and not args.eval_on_start:
            given = "--eval_dataset_name" if script.eval_dataset_name else "--dataset_test_split"
            raise ValueError(f"{given} would never be evaluated: say when by --eval_strategy epoch or steps")
        source = str(script.eval_dataset_name or script.dataset_name)
        eval_records = load_records(source, script.dataset_test_split or "train", script.dataset_config)
    elif args.eval_strategy != "no":
        raise ValueError("--eval_strategy needs data: --eval_dataset_name or --dataset_test_split")
    return train_records, eval_records


def plan(script: ScriptArguments, args: PlanConfig) -> None:
    """Print what a run with these options needs, or how long its pairs may be."""
    from hdpo_train.plan.fit import print_fit
    from hdpo_train.plan.step import Build, print_plan

    if script.model_name_or_path is None:
        raise ValueError("a plan needs --model_name_or_path; of the model only its config is read")
    folder, gguf = where_from(script.model_name_or_path)
    with reading("config", script.model_name_or_path):
        config = AutoConfig.from_pretrained(folder, **gguf, trust_remote_code=script.trust_remote_code)

    def builder(script: ScriptArguments) -> Build:
        dtype = getattr(torch, script.dtype) if script.dtype != "auto" else getattr(config, "dtype", None)
        options: dict[str, Any] = {"dtype": dtype or torch.float32, "trust_remote_code": script.trust_remote_code}
        if script.attn_implementation:
            options["attn_implementation"] = script.attn_implementation

        def build(config: Any) -> Any:
            with reading("model", str(script.model_name_or_path)):
                model = AutoModelForCausalLM.from_config(config, **options)
            return add_adapter(model, _lora(script)) if script.use_peft else model

        return build

    def say(text: str) -> None:
        print(f"({text})", file=sys.stderr, flush=True)

    try:
        if args.fit is None:
            print_plan(config, args, builder(script), say)
        else:
            print_fit(config, script, args, builder, say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; a plan leaves nothing behind and starts from the beginning") from None


def _lora(script: ScriptArguments) -> Any:
    """A LoraConfig of the options; what is not given is peft's for every linear layer."""
    options = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return import_peft("--use_peft").LoraConfig(**{**options, **_given_lora(script)})


def _given_lora(script: ScriptArguments) -> dict[str, Any]:
    modules: Any = script.lora_target_modules
    if modules and len(modules) == 1 and (modules[0] == "all-linear" or re.search(r"[^\w.]", modules[0])):
        (modules,) = modules  # a word of peft's, or a regular expression; a module's name goes in a list
    given = {
        "r": script.lora_r,
        "lora_alpha": script.lora_alpha,
        "lora_dropout": script.lora_dropout,
        "target_modules": modules,
    }
    return {name: value for name, value in given.items() if value is not None}


def _check_lora(script: ScriptArguments, own: Any, disable_dropout: bool) -> None:
    """Raise ValueError for --lora_* options that are not those of the adapter that the model has already."""
    for name, value in _given_lora(script).items():
        option = f"--lora_{name.removeprefix('lora_')}"
        has = getattr(own, name, None)
        if has != (set(value) if isinstance(has, set) and isinstance(value, list) else value):
            raise ValueError(
                f"{option} is {value}, but {script.model_name_or_path} is an adapter with {has}, which this run trains "
                f"on: leave out {option}; or merge the adapter into its base model, save it, and add a new one to that"
            )
        if name == "lora_dropout" and value and disable_dropout:
            raise ValueError(
                f"{option} {value} on an adapter that has been trained makes the policy differ from its reference "
                f"before training: leave out {option}, or keep every dropout by --disable_dropout false"
            )


if __name__ == "__main__":
    main()
