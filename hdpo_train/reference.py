"""Reference log-probabilities: computed once, before training, in the training precision, and cached on disk.

The cache is keyed by everything the numbers depend on: the reference's weights, the token ids (and so tokenizer, chat
template, data and lengths), precision and attention. A file is written beside its place and moved there when complete,
and carries a checksum; what does not match is computed again, and said so.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from hdpo_train.data.own_reference import COLUMNS
from hdpo_train.data.tokenize import PairCollator
from hdpo_train.model.fingerprint import hash_weights
from hdpo_train.model.head import bare, model_inputs
from hdpo_train.model.loading import adapter_configs, evaluating
from hdpo_train.model.sequence_ranks import SequenceRanks
from hdpo_train.ranks import as_in_training, data_ranks, gathered, shards

logger = logging.get_logger(__name__)
_FORMAT = "1"  # of the cache file
# config keys that do not affect log-probs
_NOT_THE_FUNCTION = (
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "dtype",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_NOT_OF_THE_ADAPTER = (
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_version",
)


def with_reference(
    dataset: Dataset,
    model: nn.Module,
    *,
    accelerator: Accelerator,
    collator: PairCollator,
    batch_size: int,
    cache_dir: str | None,
    name: str,
    chunk_bytes: int | None = None,
    without_adapter: bool = False,
    sequence_ranks: SequenceRanks | None = None,
) -> Dataset:
    """The data set with columns ref_chosen_logp and ref_rejected_logp (nats, sums over the completion).

    Args:
        dataset: with columns prompt_ids, chosen_ids, rejected_ids.
        model: the reference, taught the loss by `head.attach_loss`; it runs in eval mode in the precision that training
            runs in, whole on every rank.
        collator: makes its batches of so many pairs (batch_size).
        cache_dir: default: hdpo_reference in the Hugging Face cache.
        without_adapter: the reference is a peft model's base.
        sequence_ranks: processes that share every row.

    Raises ValueError if the ranks do not have the same reference and data.
    """
    if set(COLUMNS) <= set(dataset.column_names):
        logger.warning(
            f"reference log-probs of the {name} set: taken from its columns {' and '.join(COLUMNS)}; they must be sums "
            "over the completions, each as long as it is trained on"
        )
        return dataset
    with (
        gathered(model),
        model.disable_adapter() if without_adapter else contextlib.nullcontext(),  # type: ignore[operator]
    ):
        precision = accelerator.mixed_precision + (" weights" if shards(accelerator) else "")
        key = cache_key(dataset, model, precision, without_adapter)
        if len(set(gather_object([key]))) > 1:
            raise ValueError(
                f"the ranks have different reference models or different {name} sets: load the same weights on all of "
                "them (under FSDP: fsdp_cpu_ram_efficient_loading: false)"
            )
        path = Path(cache_dir or Path(HF_HOME) / "hdpo_reference").expanduser() / f"{key[:32]}.safetensors"
        logps = _read(path, key, len(dataset))
        if accelerator.num_processes > 1:  # all ranks read it, or all compute
            found = torch.tensor(int(logps is not None), device=accelerator.device)
            logps = logps if int(accelerator.reduce(found, "sum")) == accelerator.num_processes else None
        if logps is None:
            logps = _compute(dataset, model, accelerator, collator, batch_size, name, chunk_bytes, sequence_ranks)
            if accelerator.is_main_process:
                _write_or_warn(path, key, logps)
            accelerator.wait_for_everyone()
        else:
            logger.info(f"reference log-probs of the {name} set: read from {path}")
    for column, values in zip(COLUMNS, logps.T.tolist(), strict=True):
        dataset = dataset.add_column(column, values)
    return dataset


def cache_key(dataset: Dataset, model: nn.Module, precision: str, without_adapter: bool = False) -> str:
    """SHA-256 over weights, config, token ids, precision and attention implementation."""
    config: Any = bare(model).config
    settings = {key: value for key, value in config.to_dict().items() if key not in _NOT_THE_FUNCTION}
    digest = hashlib.sha256(f"{_FORMAT} {precision} {config._attn_implementation}".encode())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for adapter, options in () if without_adapter else adapter_configs(model).items():  # a scale is in no weight
        options = {key: value for key, value in options.to_dict().items() if key not in _NOT_OF_THE_ADAPTER}
        options = {key: sorted(value) if isinstance(value, set) else value for key, value in options.items()}
        digest.update(f"{adapter} {json.dumps(options, sort_keys=True, default=str)}".encode())
    # An adapter that is off must not change the key: its initial values are random.
    prefix = str(model.base_model.prefix) if without_adapter else None  # type: ignore[union-attr]
    hash_weights(digest, model, without=prefix)
    for batch in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).iter(batch_size=1000):
        digest.update(repr(batch).encode())
    return digest.hexdigest()


@torch.no_grad()
def _compute(
    dataset: Dataset,
    model: nn.Module,
    accelerator: Accelerator,
    collator: PairCollator,
    batch_size: int,
    name: str,
    chunk_bytes: int | None,
    sequence_ranks: SequenceRanks | None,
) -> Tensor:
    data = data_ranks(accelerator, sequence_ranks)
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=batch_size,
        collate_fn=collator,
        generator=torch.Generator(),  # torch's own stays as it is when the numbers come from the cache
    )
    loader = data.prepare_data_loader(loader)
    parts = []
    description = f"Reference log-probs ({name})"
    with evaluating(model), as_in_training(model, accelerator):
        for batch in tqdm(loader, desc=description, unit="batch", disable=not accelerator.is_main_process):
            inputs = model_inputs(batch, accelerator.device, {"chunk_bytes": chunk_bytes}, sequence_ranks)
            logps = model(**inputs).logps.view(-1, 2)
            parts.append(data.gather_for_metrics(logps).float().cpu())
    logps = torch.cat(parts)
    if len(logps) != len(dataset):
        raise RuntimeError(f"{len(logps)} reference log-probs for {len(dataset)} pairs of the {name} set")
    if not logps.isfinite().all():
        pair = int((~logps.isfinite()).any(1).nonzero()[0])
        raise FloatingPointError(
            f"the reference model gives log-probability {logps[pair].tolist()} to pair {pair + 1} of the {name} set; "
            "check its weights, or train in bf16 or fp32 if this is fp16"
        )
    return logps


def _checksum(logps: Tensor) -> str:
    return hashlib.sha256(logps.contiguous().numpy().data).hexdigest()


def _write_or_warn(path: Path, key: str, logps: Tensor) -> None:
    """A full disk only costs the cache: this run already has the values."""
    try:
        _write(path, key, logps)
    except (OSError, SafetensorError) as error:
        logger.warning(
            f"the reference log-probs could not be cached in {path.parent} ({error}); this run goes on with them, the "
            "next start computes them again (--ref_cache_dir chooses another folder)"
        )
    for partial in path.parent.glob(f"{path.stem}.*.partial"):  # of this run, or of one that was killed
        with contextlib.suppress(OSError):
            partial.unlink()


def _write(path: Path, key: str, logps: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({"logps": logps.contiguous()}, partial, metadata={"key": key, "sha256": _checksum(logps)})
    os.replace(partial, path)


def _read(path: Path, key: str, num_pairs: int) -> Tensor | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata, logps = file.metadata() or {}, file.get_tensor("logps")
    except (SafetensorError, OSError) as error:
        logger.warning(f"the cached reference log-probs {path} cannot be read ({error}); computing them again")
        return None
    if metadata.get("key") != key or metadata.get("sha256") != _checksum(logps) or logps.shape != (num_pairs, 2):
        logger.warning(f"the cached reference log-probs {path} do not match their checksum; computing them again")
        return None
    return logps
