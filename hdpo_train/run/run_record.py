"""run.json: what a run was started with. It lies in the run's folder and in each of its checkpoints.

Resuming compares: options that change results, the base model, the tokenizer and the data, by contents. What only
changes speed, logging or where something is kept is not recorded.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from hdpo_train.files import write_whole
from hdpo_train.model.fingerprint import hash_weights

RUN_FILE = "run.json"
# options of TrainingArguments that change results; all of HDPOConfig's own do, but for those below
_TRAINING = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy", "dataloader_drop_last",
    "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed",
    "data_seed", "bf16", "fp16", "neftune_noise_alpha",
)  # fmt: skip
_OF_SPEED = (
    "packing", "shared_prompt", "tiled_layers", "chunk_bytes", "dataset_num_proc", "precompute_ref_batch_size",
    "ref_cache_dir", "overwrite_output_dir", "model_init_kwargs",
)  # fmt: skip
# of these a run's length is made
LENGTH = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_tokens_per_batch", "dataloader_drop_last", "processes", "train data set",
)  # fmt: skip


def options_of(
    args: TrainingArguments, model: nn.Module, tokenizer: Any, datasets: Mapping[str, Dataset], optimizer: Any = None
) -> dict[str, Any]:
    """Everything that results depend on, by name. datasets: tokenized. optimizer: the user's own, if any."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)} | set(_OF_SPEED)
    own = [field.name for field in dataclasses.fields(args) if field.name not in inherited]
    options = {name: getattr(args, name) for name in (*_TRAINING, *own)}
    if optimizer is not None:
        options["optim"] = type(optimizer).__name__
    options |= {"processes": args.world_size, "model": fingerprint(model), **_adapter(model)}
    options |= {"tokenizer": _vocabulary(tokenizer), "chat template": _digest([str(tokenizer.chat_template)])}
    for name, dataset in datasets.items():
        ids = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).iter(batch_size=1000)
        options[f"{name} data set"] = f"{len(dataset)} pairs, {_digest(repr(batch) for batch in ids)}"
    return json.loads(json.dumps(options, default=_plain))


def fingerprint(model: nn.Module) -> str:
    """A digest of the weights that training starts from, without adapters, whose first values are random."""
    adapter = getattr(getattr(model, "base_model", None), "prefix", None) if hasattr(model, "peft_config") else None
    sha = hashlib.sha256()
    hash_weights(sha, model, without=adapter)
    return sha.hexdigest()[:12]


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """'alpha 0.9 → 1.0', for each that differs."""
    names = [*now, *(name for name in before if name not in now)]
    pairs = ((name, before.get(name), now.get(name)) for name in names)
    return [f"{name} {old} → {new}" for name, old, new in pairs if old != new]


def write_record(folder: Path, options: dict[str, Any], ended: int | None = None) -> None:
    """ended: the last step of a run whose model has been saved."""
    text = json.dumps({"options": options, "ended": ended}, indent=2, ensure_ascii=False)
    write_whole(folder / RUN_FILE, text + "\n")


def read_options(folder: Path) -> dict[str, Any]:
    """The options that the folder's run was started with; empty if none can be read."""
    return _read(folder).get("options") or {}


def ended_at(folder: Path, options: dict[str, Any]) -> int | None:
    """The last step, if the folder holds a run of this length that has ended."""
    found = read_options(folder)
    same = all(found.get(name) == options.get(name) for name in LENGTH)
    return _read(folder).get("ended") if found and same else None


def _read(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _adapter(model: Any) -> dict[str, Any]:
    """The options of the adapter that is trained, such as r and lora_alpha."""
    if not hasattr(model, "peft_config"):
        return {}
    config = model.peft_config[model.active_adapters[0]].to_dict()
    places = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
    return {f"adapter {key}": value for key, value in config.items() if value and key not in places}


def _vocabulary(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _digest([repr(sorted(tokenizer.get_vocab().items()))])
    state = json.loads(backend.to_str())
    return _digest([repr({key: value for key, value in state.items() if key not in ("padding", "truncation")})])


def _digest(texts: Iterable[str]) -> str:
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode(errors="surrogatepass"))
    return sha.hexdigest()[:12]


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if isinstance(value, Enum) else str(value)
