"""A run, from the names of a model and data sets to a saved model."""

import copy
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import BitsAndBytesConfig, set_seed
from transformers.utils import is_bitsandbytes_available

from hdpo_train.config import HDPOConfig, ScriptArguments
from hdpo_train.data.tokenize import load_records
from hdpo_train.model.loading import (
    adapter_configs,
    import_peft,
    load_model,
    load_tokenizer,
)
from hdpo_train.run.output_dir import check_output_dir
from hdpo_train.run.report import METRICS_FILE, REPORT_FILE
from hdpo_train.run.resuming import taken_output_dir
from hdpo_train.trainer import HDPOTrainer


def train(script: ScriptArguments, args: HDPOConfig) -> HDPOTrainer:
    """A run of the command line, from names to a saved model."""
    check_output_dir(str(args.output_dir))
    with taken_output_dir(args, [script.model_name_or_path]):
        return _train(script, args)


def _train(script: ScriptArguments, args: HDPOConfig) -> HDPOTrainer:
    trainer = make_trainer(script, args)
    if trainer.is_world_process_zero():
        start = trainer.start
        print(f"Loss: {start['loss_type']}; {trainer.loss.way}.")
        print(
            f"{start['pairs']} pairs. Margin before training (0 for α = 1): mean {start['initial_margin']:+.3f}, "
            f"largest {start['initial_margin_largest']:.3f}"
        )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card(dataset=script.dataset_name)
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
            "--model_name_or_path and --dataset_name are needed to train (hdpo-train quickstart needs neither)"
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
    if (quantization := quantization_config(script, args)) is not None:
        init_kwargs["quantization_config"] = quantization
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
        peft_config=lora_config(script) if script.use_peft and not adapters else None,
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


def lora_config(script: ScriptArguments) -> Any:
    """The LoraConfig that the options describe. By default every linear layer gets an adapter."""
    options = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return import_peft("--use_peft").LoraConfig(**{**options, **_given_lora(script)})


def quantization_config(script: ScriptArguments, args: HDPOConfig) -> BitsAndBytesConfig | None:
    """What the base model is loaded in. Products with 4-bit weights are in the precision of the run.

    Raises ValueError without the package bitsandbytes, or if model_init_kwargs say it too.
    """
    if not (script.load_in_4bit or script.load_in_8bit):
        return None
    option = "--load_in_4bit" if script.load_in_4bit else "--load_in_8bit"
    if "quantization_config" in (args.model_init_kwargs or {}):
        raise ValueError(
            f"{option} and the quantization_config of --model_init_kwargs are given: leave out one of them"
        )
    if not is_bitsandbytes_available():
        raise ValueError(f"{option} needs the package bitsandbytes: pip install 'hdpo[train,peft,quantization]'")
    if script.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    of_weights = None if script.dtype == "auto" else script.dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype="bfloat16" if args.bf16 else "float16" if args.fp16 else of_weights,
        bnb_4bit_quant_type=script.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=script.use_bnb_nested_quant,
        bnb_4bit_quant_storage=script.bnb_4bit_quant_storage,
    )


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
