"""Options of a run: words of the command line, over those of a YAML file, over the defaults.

run.yaml ── words_of_file ──> --name=value … ─┬─ TrainingParser ──> ScriptArguments, HDPOConfig
argv ─────────────────────────────────────────┘
"""

import argparse
import copy
import dataclasses
import json
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hdpo_train.config import HDPOConfig, PlanConfig, ScriptArguments
from hdpo_train.of_trl import INSTEAD
from hdpo_train.parser import Parser, UsageError, WideHelp, did_you_mean, is_file_of_options

KINDS: tuple[Any, Any] = (ScriptArguments, HDPOConfig)
_ALONE = {"resume_from_checkpoint": "true", "fit": "free"}  # options that may stand without a value, and what they mean
GROUPS = {  # of --help_all; what transformers has beyond these comes last
    "model": (
        "model_name_or_path", "gguf_file", "dtype", "attn_implementation", "trust_remote_code", "model_init_kwargs",
        "disable_dropout", "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
        "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage",
    ),
    "data": (
        "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "eval_dataset_name",
        "on_bad_record", "dataset_num_proc",
    ),
    "loss": (
        "alpha", "beta", "loss_type", "loss_weights", "alpha_level", "label_smoothing", "nll_weight",
        "router_aux_loss_coef", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "gradient", "epsilon",
    ),
    "entropy": (
        "alpha_schedule", "alpha_final", "target_entropy", "alpha_min", "alpha_max", "entropy_steps", "entropy_prompts",
    ),
    "lengths and batches": (
        "max_length", "max_prompt_length", "per_device_train_batch_size", "gradient_accumulation_steps",
        "max_tokens_per_batch", "packing", "shared_prompt", "precompute_ref_batch_size",
    ),
    "memory": (
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing", "tiled_layers",
        "chunk_bytes", "bf16", "fp16", "optim",
    ),
    "output and resuming": (
        "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit",
        "ref_cache_dir", "logging_steps", "report_to",
    ),
    "training": (
        "learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "weight_decay",
        "max_grad_norm", "eval_strategy", "eval_steps", "seed", "use_cpu",
    ),
}  # fmt: skip
_FIRST = (  # of --help
    "model_name_or_path", "use_peft", "dataset_name", "alpha", "beta", "loss_type", "target_entropy", "max_length",
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "output_dir",
    "resume_from_checkpoint", "learning_rate", "num_train_epochs",
)  # fmt: skip
_TEXTS = {  # of options whose text in transformers is of other runs, or of another name
    "output_dir": "Folder of the run: model, metrics.jsonl, report.png, checkpoints.",
    "per_device_train_batch_size": "Pairs in a micro-batch of one device.",
    "gradient_accumulation_steps": "Micro-batches in an optimizer step.",
    "gradient_checkpointing": "Keep one hidden state per layer and token, and compute the rest again in backward: less "
    "memory for more time.",
    "num_train_epochs": "Times that every pair is trained on.",
}


class TrainingParser(Parser, HfArgumentParser):
    """Every option of a run. "None" stands for None wherever that is a value, and any flag may stand alone."""

    def __init__(self, prog: str = "hdpo-train", description: str = "", kinds: tuple[Any, Any] = KINDS) -> None:
        """kinds: ScriptArguments, and HDPOConfig or PlanConfig."""
        super().__init__(kinds, prog=prog, description=description, add_help=False, allow_abbrev=False)
        self._kinds = kinds
        self._hints: dict[str, Any] = {}
        for kind in kinds:
            self._hints |= typing.get_type_hints(kind)
        for action in self._actions:
            if action.dest == "loss_type":
                action.default = HDPOConfig.loss_type  # which HfArgumentParser forgets for a list
            if action.type is string_to_bool and action.nargs is None:
                action.nargs, action.const = "?", True
            if action.dest in _ALONE:
                action.nargs, action.const = "?", _ALONE[action.dest]
            if self.may_be(action, list):
                action.nargs = "+"
            elif (typing.get_origin(action.type) or action.type) is dict:
                action.type = _or_none(_mapping)
            elif self.may_be(action, dict):  # given as a string, which the config parses
                action.type = _or_none(_mapping_as_text if action.dest.endswith("_kwargs") else _mapping_or_file)
            elif action.type is not None and self.may_be(action, type(None)):
                action.type = _or_none(typing.cast(Callable[[str], Any], action.type))
        self.add_argument("-h", "--help", action="store_true", help="The options most used.")
        self.add_argument("--help_all", action="store_true", help="Every option.")

    def unknown(self, name: str, known: Iterable[str]) -> str:
        instead = INSTEAD.get(name.removeprefix("--").replace("-", "_"))
        return super().unknown(name, known) if instead is None else f"{name}, an option of TRL's: {instead.text}"

    def may_be(self, action: argparse.Action, kind: type) -> bool:
        """Whether a value of that type is allowed by the option's annotation."""
        hint = self._hints.get(action.dest)
        return any((typing.get_origin(part) or part) is kind for part in (hint, *typing.get_args(hint)))

    def options(self, argv: Sequence[str]) -> tuple[ScriptArguments, HDPOConfig]:
        given = vars(self.parse(argv))
        if given["help_all"]:
            self.print_help(every=True)
            raise SystemExit(0)
        for action in self._actions:
            value = given[action.dest]
            if isinstance(value, list) and len(value) == 1 and self.may_be(action, str):
                given[action.dest] = value[0]  # one word, which can mean something else than a list of one
        script, args = (
            kind(**{field.name: given[field.name] for field in dataclasses.fields(kind) if field.init})
            for kind in self._kinds
        )
        return script, args

    def print_help(self, file: Any = None, every: bool = False) -> None:
        """The options in groups: every one, or those that most runs need."""
        groups = {"plan": tuple(PlanConfig.__annotations__)} if PlanConfig in self._kinds else {}
        groups |= {title: tuple(name for name in names if every or name in _FIRST) for title, names in GROUPS.items()}
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            shown = copy.copy(action)
            shown.option_strings = action.option_strings[:1]  # not the spelling with dashes too
            shown.help = _TEXTS.get(action.dest, action.help)
            if action.choices is None or len(list(action.choices)) > 5:
                shown.choices, shown.metavar = None, "X"
            if action.default is not None and shown.help:
                default = getattr(action.default, "value", action.default)
                shown.help = f"{shown.help} (default: {default})".replace("%", "%%")
            actions.setdefault(action.dest, shown)
        if every:
            grouped = {name for names in groups.values() for name in names}
            groups["all others of transformers.TrainingArguments"] = tuple(
                name for name in actions if name not in grouped | {"help", "help_all", "logging_nan_inf_filter"}
            )
        short = argparse.ArgumentParser(
            prog=self.prog,
            usage=f"{self.prog} [CONFIG.yaml] [--option value …]",
            description=self.description,
            epilog="" if every else f"{self.prog} --help_all lists every option.",
            formatter_class=WideHelp,
            add_help=False,
        )
        for title, names in groups.items():
            group = short.add_argument_group(title)
            group._group_actions.extend(actions[name] for name in names if name in actions)
        short.print_help(file)


def parse_options(argv: Sequence[str], parser: TrainingParser | None = None) -> tuple[ScriptArguments, HDPOConfig]:
    """The options of a command line, whose first word may be the name of a YAML file.

    Raises UsageError for an option that does not exist or a value of another type, ValueError for one out of range.
    """
    return (parser or TrainingParser()).options(with_file(argv))


def with_file(argv: Sequence[str]) -> list[str]:
    """The words, with those of the YAML file in its place where the first word names one."""
    files = [word for word in argv[:2] if is_file_of_options(word)]
    if len(files) > 1:
        raise UsageError(f"options are read from one YAML file, not from {' and '.join(files)}")
    return [*words_of_file(argv[0]), *argv[1:]] if argv and argv[0] in files else list(argv)


def words_of_file(name: str) -> list[str]:
    """The options of a YAML file as words of a command line.

    A value is read as it is written there: "save_strategy: no" is the word no, as on the command line, not YAML's
    false.
    """
    parser = TrainingParser()
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "help_all")}
    words = []
    for option, node in _entries(name):
        if option not in actions:
            raise UsageError(
                f"{name}: no such option: {option}{did_you_mean(option, actions)} (hdpo-train --help_all lists them)"
            )
        try:
            more = _words(parser, actions[option], node)
            parser.parse(more)
        except (ValueError, yaml.YAMLError) as error:
            raise UsageError(f"{name}, line {node.start_mark.line + 1}: {' '.join(str(error).split())}") from error
        words += more
    return words


def _entries(name: str) -> list[tuple[str, yaml.Node]]:
    try:
        with open(name, encoding="utf-8") as file:
            loader = yaml.SafeLoader(file)
            root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f"{name} must hold options as 'name: value' lines")
        options = [str(key.value) for key, _ in root.value]
        loader.flatten_mapping(root)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{name} cannot be read: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error
    if twice := [option for number, option in enumerate(options) if option in options[:number]]:
        raise UsageError(f"{name}: {twice[0]} is given twice")
    return [(str(key.value), value) for key, value in root.value]


def _words(parser: TrainingParser, action: argparse.Action, node: yaml.Node) -> list[str]:
    """An option of the file as words of the command line."""
    option = f"--{action.dest}"
    if isinstance(node, yaml.MappingNode):
        if not parser.may_be(action, dict):
            raise UsageError(f"{option} takes no mapping")
        return [f"{option}={json.dumps(_value(node), default=str)}"]
    if isinstance(node, yaml.SequenceNode):
        if action.nargs != "+" or not all(isinstance(part, yaml.ScalarNode) for part in node.value):
            kind = "a list of words" if action.nargs == "+" else "one value"
            raise UsageError(f"{option} takes {kind}, got the list {_value(node)}")
        return [option, *(part.value for part in node.value)]
    if node.tag == "tag:yaml.org,2002:null":
        if not parser.may_be(action, type(None)):
            raise UsageError(f"{option} has no value")
        return [] if action.nargs == "+" else [f"{option}=None"]
    if node.tag == "tag:yaml.org,2002:bool" and parser.may_be(action, bool):
        return [f"{option}={str(_value(node)).lower()}"]  # "on" and "off" too
    return [f"{option}={node.value}"]


def _value(node: yaml.Node) -> Any:
    return yaml.SafeLoader("").construct_document(node)


def _mapping(word: str) -> dict[str, Any]:
    try:
        value = json.loads(word)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'a mapping in JSON is needed, like {{"key": 1}}; got {word[:80]!r}')
    return value


def _mapping_as_text(word: str) -> str:
    _mapping(word)
    return word


def _mapping_or_file(word: str) -> str:
    return _mapping_as_text(word) if word.lstrip().startswith("{") else word


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def optional(word: str) -> Any:
        return None if word == "None" else convert(word)

    optional.__name__ = getattr(convert, "__name__", "value")  # in argparse's messages
    return optional
