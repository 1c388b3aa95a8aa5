"""What a model is, in a few characters: hashes of its weights or of its files."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from hdpo_train.files import contents_digest
from hdpo_train.model.loading import where_from


def hash_weights(sha: Any, model: nn.Module, without: str | None = None) -> None:
    """Feed a hash with names, dtypes, shapes and bytes of a model's parameters and buffers, sharded ones made whole.

    Args:
        sha: a hash object of hashlib.
        without: leave out the weights with this in their name, such as an adapter's prefix.
    """
    for name, tensor in sorted(model.state_dict().items()):
        if without is not None and without in name:
            continue
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Short SHA-256 over the weights and the tokens that end a text."""
    sha = hashlib.sha256(str(model.generation_config and model.generation_config.eos_token_id).encode())
    hash_weights(sha, model)
    return sha.hexdigest()[:16]


def files_fingerprint(model_name_or_path: str) -> str:
    """The fingerprint of a model that is not loaded: SHA-256 over its files here, or a hub id's commit."""
    name, gguf = where_from(model_name_or_path)
    folder = Path(name)
    if gguf and folder.is_dir():
        return contents_digest(Path(gguf["gguf_file"]))
    if not folder.is_dir():
        cached = str(cached_file(name, gguf.get("gguf_file", "config.json")))
        return f"{model_name_or_path} {cached.partition('/snapshots/')[2].partition('/')[0]}"
    patterns = ("config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "pytorch_model*.bin")
    sha = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        sha.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**24):
                sha.update(block)
    return sha.hexdigest()[:16]
