"""The command line: hdpo-train (= python -m hdpo_train; accelerate launch -m hdpo_train …)."""

import argparse
import copy
import dataclasses
import gc
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, set_seed

from hdpo_train.config import HDPOConfig, ScriptArguments
from hdpo_train.data import load_records
from hdpo_train.models import add_adapter, load_model, load_tokenizer
from hdpo_train.report import METRICS_FILE, REPORT_FILE
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
  hdpo-train eval …                                   accuracy, pass@k, diversity and entropy of models on a file of
                                                      prompts (hdpo-train eval --help)

Records: {"prompt", "chosen", "rejected"} as strings or chat messages; the prompt may be left out where both completions
begin with it. A run leaves the model, metrics.jsonl and report.png in output_dir.
"""
_COMMANDS = {  # each module has main(argv)
    "quickstart": "hdpo_train.quickstart",
    "eval": "hdpo_train.eval_cli",
    "sweep": "hdpo_train.sweep",
}
_COMMON = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16",
    "activation_checkpointing", "gradient_checkpointing", "logging_steps", "eval_strategy", "eval_steps", "save_steps",
    "save_total_limit", "resume_from_checkpoint", "report_to", "seed", "use_cpu",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """A command of the command line. Exit codes: 2 for an error that is said in words, 130 after Ctrl-C."""
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as interrupt:  # the trainer's says where the run stands
        print(f"\nhdpo-train: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in _COMMANDS:
        command_of_its_own = importlib.import_module(_COMMANDS[argv[0] if argv else "quickstart"])
        try:
            command_of_its_own.main(argv[1:])
        except (ValueError, OSError, FloatingPointError) as error:
            _fail(str(error))
        return
    parser = _parser()
    if {"-h", "--help"} & set(argv):
        _print_help(parser)
        return
    if "--help_all" in argv:
        parser.print_help()
        return
    command: Callable[[ScriptArguments, HDPOConfig], Any] = train
    if argv[0] == "plan":
        command, argv = plan, argv[1:]
    if not argv:
        _fail("plan needs the options of a run: hdpo-train plan --model_name_or_path MODEL --max_length 2048 …")
    script, args = parse_options(argv)
    try:
        command(script, args)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if args.log_level == "debug":
            raise
        _fail(f"{error}\n(--log_level debug shows where this was raised)")
    if dist.is_initialized():
        # The group outlives this in the trainer's cycles; a thread of gloo that meets Python's end ends in SIGABRT.
        gc.collect()
        dist.destroy_process_group()


def train(script: ScriptArguments, args: HDPOConfig) -> HDPOTrainer:
    """A run of the command line, from names to a saved model."""
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
        if trainer.entropy_control is not None:
            print(trainer.entropy_control.describe())
        print(f"model: {folder}   metrics: {folder / METRICS_FILE}   plots: {folder / REPORT_FILE}")
    return trainer


def make_trainer(script: ScriptArguments, args: HDPOConfig) -> HDPOTrainer:
    """Model and data loaded by their names, reference log-probs computed or read."""
    if script.model_name_or_path is None or script.dataset_name is None:
        raise ValueError(
            "--model_name_or_path and --dataset_name are needed to train (with no option at all: the quickstart)"
        )
    set_seed(args.seed)
    train_records = load_records(script.dataset_name, script.dataset_train_split, script.dataset_config)
    eval_records = None
    if script.eval_dataset_name or script.dataset_test_split:
        source = script.eval_dataset_name or script.dataset_name
        eval_records = load_records(source, script.dataset_test_split or "train", script.dataset_config)
    elif args.eval_strategy != "no":
        raise ValueError("--eval_strategy needs data: --eval_dataset_name or --dataset_test_split")

    remote_code = {"trust_remote_code": script.trust_remote_code}
    tokenizer = load_tokenizer(script.model_name_or_path, **remote_code)
    init_kwargs: dict[str, Any] = {"dtype": script.dtype, **remote_code}
    if script.attn_implementation:
        init_kwargs["attn_implementation"] = script.attn_implementation
    if isinstance(args.model_init_kwargs, dict):
        init_kwargs |= args.model_init_kwargs
    return HDPOTrainer(
        model=load_model(script.model_name_or_path, init_kwargs),
        args=args,
        train_dataset=train_records,
        eval_dataset=eval_records,
        processing_class=tokenizer,
        peft_config=_lora(script) if script.use_peft else None,
    )


def plan(script: ScriptArguments, args: HDPOConfig) -> None:
    """Print what a run with these options needs."""
    from hdpo_train.plan import describe, make_plan

    if script.model_name_or_path is None:
        raise ValueError("a plan needs --model_name_or_path; of the model only its config is read")
    config = AutoConfig.from_pretrained(script.model_name_or_path, trust_remote_code=script.trust_remote_code)
    dtype = getattr(torch, script.dtype) if script.dtype != "auto" else getattr(config, "dtype", None)
    options: dict[str, Any] = {"dtype": dtype or torch.float32}
    if script.attn_implementation:
        options["attn_implementation"] = script.attn_implementation

    def build(config: Any) -> Any:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=script.trust_remote_code, **options)
        return add_adapter(model, _lora(script)) if script.use_peft else model

    print(describe(make_plan(config, args, build), args))


def _lora(script: ScriptArguments) -> Any:
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("--use_peft needs the peft package: pip install 'hdpo[train,peft]'") from None
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=script.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def _parser() -> HfArgumentParser:
    parser = HfArgumentParser([ScriptArguments, HDPOConfig], prog="hdpo-train", add_help=False, allow_abbrev=False)  # type: ignore[list-item]
    parser.add_argument("-h", "--help", action="store_true", help="The options most used.")
    parser.add_argument("--help_all", action="store_true", help="Every option.")
    return parser


def parse_options(argv: list[str]) -> tuple[ScriptArguments, HDPOConfig]:
    """Flags over the YAML file's values over defaults. Ends the program for an option that does not exist."""
    parser = _parser()
    if argv[0].endswith((".yaml", ".yml")):
        parser.set_defaults(**_read_yaml(argv[0]))
        argv = argv[1:]
    for at, word in enumerate(argv):
        bare_flag = word == "--resume_from_checkpoint" and (at + 1 == len(argv) or argv[at + 1].startswith("--"))
        if bare_flag:
            argv = [*argv[: at + 1], "true", *argv[at + 1 :]]
    try:
        script, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[:2]
    except ValueError as error:  # an option out of range, or one that does not exist
        _fail(str(error))
    return script, args


def _read_yaml(name: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        _fail(f"{name} cannot be read: {error}")
    if not isinstance(values, dict):
        _fail(f"{name} must hold options as 'name: value' lines")
    known = {field.name for kind in (ScriptArguments, HDPOConfig) for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        _fail(f"{name}: no such option: {', '.join(unknown)} (hdpo-train --help_all lists them)")
    return values  # argparse converts those that are strings, such as 5e-7, which YAML takes for one


def _print_help(parser: HfArgumentParser) -> None:
    """The parser's options, those most used only, in groups."""
    own = [field for field in HDPOConfig.__annotations__ if not field.startswith("_") and field not in _COMMON]
    groups = {
        "model and data": [field.name for field in dataclasses.fields(ScriptArguments)],
        "loss, reference, lengths": [name for name in own if name != "logging_nan_inf_filter"],
        "training (transformers.TrainingArguments; all of them: --help_all)": list(_COMMON),
    }
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        shown = copy.copy(action)
        shown.option_strings = action.option_strings[:1]  # not the spelling with dashes too
        if action.choices is None or len(list(action.choices)) > 5:
            shown.choices, shown.metavar = None, "X"
        if action.default is not None and action.help:
            shown.help = f"{action.help} [{getattr(action.default, 'value', action.default)}]".replace("%", "%%")
        actions.setdefault(action.dest, shown)
    short = argparse.ArgumentParser(
        prog="hdpo-train",
        usage="hdpo-train [CONFIG.yaml] [--option value …]",
        description=_EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=118),
        add_help=False,
    )
    for title, names in groups.items():
        group = short.add_argument_group(title)
        group._group_actions.extend(actions[name] for name in names if name in actions)
    short.print_help()


def _fail(message: str) -> NoReturn:
    print(f"hdpo-train: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
