"""Models and tokenizers: loaded by name, given an adapter, made quiet, set to evaluation mode for a while."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(name: str, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """AutoModelForCausalLM.from_pretrained, in fp32 unless init_kwargs say otherwise: at learning rates of preference
    training, bf16 weights round most updates away."""
    with reading("model", name):
        return AutoModelForCausalLM.from_pretrained(name, **{"dtype": torch.float32, **(init_kwargs or {})})


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    with reading("tokenizer", name, "save one there (tokenizer.save_pretrained), or pass it as processing_class"):
        return AutoTokenizer.from_pretrained(name, **kwargs)


@contextmanager
def reading(what: str, name: str, way_out: str = "") -> Iterator[None]:
    """Makes a ValueError that names the folder of whatever a library raises for files that it cannot make a model of.

    Damaged files, and files of something else, end in errors of every type: of JSON, of safetensors, of tokenizers, of
    a config's checks, of attributes that torch has not.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise  # not of the files
    except Exception as error:
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        reason = kind + textwrap.shorten(str(error), 600, placeholder=" …")
        where = f"no {what} can be loaded from {name!r}"
        if not Path(name).exists():
            where, way_out = f"{name!r} is no folder here, and no {what} of that name could be had from the hub", ""
        raise ValueError(f"{where} ({reason})" + (f"; {way_out}" if way_out else "")) from error


def add_adapter(model: Any, peft_config: Any) -> Any:
    import peft

    if isinstance(model, peft.PeftModel):
        raise ValueError("the model has an adapter already; leave peft_config out to train it")
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(f"{type(peft_config).__name__} adds virtual tokens to the prompt; use LoRA or another adapter")
    return peft.get_peft_model(model, peft_config)


def disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):  # applied by the attention function
            module.attention_dropout = 0.0  # type: ignore[assignment]


def backbone_of(model: PreTrainedModel) -> Any:
    """The part of a causal language model that gives its hidden states.

    A few families (Llama 4's text model) name a prefix that is not there, and are a base_model of their own.
    """
    backbone = model.base_model
    return backbone if backbone is not model else getattr(model, "model", model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; its mode is restored."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
