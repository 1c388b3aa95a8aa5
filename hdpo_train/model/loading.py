"""Models and tokenizers: loaded whole by name or refused, given an adapter, made quiet."""

import copy
import dataclasses
import re
import textwrap
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file, is_gguf_available, is_peft_available

_NOISE = re.compile("drop|jitter")  # in the names of options that make a model random in training mode
_OF_THE_REPOSITORY = ("revision", "subfolder")  # options of from_pretrained that mean an adapter's repository, and
_OF_THE_HUB = ("token", "cache_dir", "local_files_only")  # those that mean its base model's too
_SHOWN = 5
_GGUF = ".gguf"


def load_model(name: str, init_kwargs: dict[str, Any] | None = None) -> Any:
    """A causal language model; where `name` holds an adapter, its base model with that adapter, ready to be trained.

    name: local folder or hub id, or the path of a GGUF file in one: its weights are dequantized, and what is saved of
        the model is an ordinary one.
    init_kwargs: keywords of from_pretrained. Weights are fp32 unless they say otherwise: at learning rates of
        preference training, bf16 weights round most updates away.

    Raises ValueError if the files lack a weight, or hold an adapter of a kind that cannot be trained here, and for a
    GGUF file without the package gguf; FileNotFoundError if there is no such GGUF file.
    """
    options = {"dtype": torch.float32, **(init_kwargs or {})}
    name = in_gguf(name, options.pop("gguf_file", None))
    hub = {key: options[key] for key in (*_OF_THE_REPOSITORY, *_OF_THE_HUB) if key in options}
    if is_gguf(name):
        return _load_whole(name, options)
    with reading("model", name):
        is_adapter = find_adapter_config_file(name, **hub) is not None
    if not is_adapter:
        return _load_whole(name, options)
    peft = import_peft(f"{name} is an adapter, which")
    with reading("adapter", name):
        config = peft.PeftConfig.from_pretrained(name, **hub)
    _check_kind(config)
    base = name
    if not (Path(name) / "config.json").is_file():  # else the base model lies beside its adapter
        base = config.base_model_name_or_path
        options = {key: value for key, value in options.items() if key not in _OF_THE_REPOSITORY}
    model = _load_whole(base, options)
    with reading("adapter", name), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        return peft.PeftModel.from_pretrained(model, name, is_trainable=True, **hub).eval()


def _load_whole(name: str, options: dict[str, Any]) -> PreTrainedModel:
    folder, gguf = where_from(name)
    if gguf and hasattr(transformers, "GgufConfig"):  # versions that would keep some models' weights quantized
        options = {"quantization_config": transformers.GgufConfig(dequantize=True), **options}
    with reading("model", name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **{**options, **gguf, "output_loading_info": True})
    model, info = loaded
    if gguf:
        _make_ordinary(model, name)
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:_SHOWN])}{more}, which would be random numbers: save the "
            f"whole {type(model).__name__} there, or correct its config.json"
        )
    return model


def _make_ordinary(model: PreTrainedModel, name: str) -> None:
    """A model of a GGUF file, whose weights are plain numbers by now, is one that can be trained and saved."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.config._name_or_path = model.name_or_path = name
    model.config.architectures = [type(model).__name__]  # as in a saved config: the same model, the same reference


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: see `load_model`."""
    folder, gguf = where_from(name)
    with reading("tokenizer", name, "save one there (tokenizer.save_pretrained), or pass it as processing_class"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **gguf, **kwargs)
        if gguf:  # transformers 5.17 takes the first token of a text for the last, and leaves out padding
            config = AutoConfig.from_pretrained(folder, **gguf)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                tokenizer.init_kwargs.pop(name, None)
                if getattr(config, name, None) is not None:
                    setattr(tokenizer, name, getattr(config, name))
        return tokenizer


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return Path(name).suffix == _GGUF and not Path(name).is_dir()


def in_gguf(name: str, gguf_file: str | None) -> str:
    """The name of the model in a GGUF file of the folder or repository `name`. Raises ValueError for another file."""
    if gguf_file is None:
        return name
    if not gguf_file.endswith(_GGUF):
        raise ValueError(f"gguf_file must name a {_GGUF} file, got {gguf_file!r}")
    if is_gguf(name):
        raise ValueError(f"{name} names a GGUF file already: leave out gguf_file {gguf_file!r}")
    return f"{str(name).rstrip('/')}/{gguf_file}"


def where_from(name: str) -> tuple[str, dict[str, Any]]:
    """A model's name as from_pretrained takes it: folder or hub id, and the keyword for a GGUF file in it.

    "folder/model.gguf" is a file here, or "owner/repository/model.gguf" one of the hub.
    Raises FileNotFoundError if it can be neither, ValueError without the package gguf.
    """
    if not is_gguf(name):
        return name, {}
    if not is_gguf_available():
        raise ValueError(f"{name} is a GGUF file, which needs the package gguf: pip install gguf")
    path, parts = Path(name), str(name).split("/")
    if path.is_file():  # from_pretrained would look for a relative path in the working directory first
        return str(path.parent), {"gguf_file": str(path.absolute())}
    if len(parts) < 3 or not all(parts[:2]) or path.parent.exists() or parts[0] in (".", "..", "~"):
        there = ", ".join(sorted(each.name for each in path.parent.glob(f"*{_GGUF}"))) or "none"
        raise FileNotFoundError(f"there is no file {name}; GGUF files in {path.parent}: {there}")
    return "/".join(parts[:2]), {"gguf_file": "/".join(parts[2:])}


@contextmanager
def reading(what: str, name: str, way_out: str = "") -> Iterator[None]:
    """Turn whatever a library raises for files that it cannot load into a ValueError that names the folder.

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


def import_peft(what: str) -> Any:
    if not is_peft_available():
        raise ValueError(f"{what} needs the peft package: pip install 'hdpo[train,peft]'")
    import peft

    return peft


def make_policy(model: Any, peft_config: Any, *, quiet: bool) -> Any:
    """The model that is trained: with the adapter that peft_config asks for, or that the model has already.

    quiet: without dropout, but for that of peft_config: its adapter adds nothing at the start, whatever is dropped.
    Raises ValueError for an adapter of a kind that cannot be trained here, and for one on top of another.
    """
    policy = _wrapped(model) if _has_adapter(model) else model
    _compute_as_in_training(policy)
    if quiet:
        disable_dropout(policy)
    if peft_config is not None:
        policy = add_adapter(policy, peft_config)
    for config in adapter_configs(policy).values():
        _check_kind(config)
    if _is_wrapper(policy):
        _check_saved_adapter(policy)
    return policy


def check_trainable(policy: nn.Module) -> None:
    """Raises ValueError if no weight of the policy would be trained."""
    if any(parameter.requires_grad for parameter in policy.parameters()):
        return
    ways = "set requires_grad of the weights to train"
    if _is_wrapper(policy):
        ways = (
            "load the adapter with PeftModel.from_pretrained(base, folder, is_trainable=True), or give its folder "
            "as model"
        )
    raise ValueError(f"all weights of {type(policy).__name__} are frozen, so that nothing would be trained: {ways}")


def add_adapter(model: Any, peft_config: Any) -> Any:
    peft = import_peft("peft_config")
    if _is_wrapper(model) or _has_adapter(model):
        raise ValueError(
            "the model has an adapter already: leave peft_config (--use_peft) out to train that one, which is also the "
            "reference then; or merge it (peft's merge_and_unload), save the result, and add an adapter to that"
        )
    _check_kind(peft_config)
    return peft.get_peft_model(model, peft_config)


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """By name, the configs of a peft model's adapters, or of those that transformers put into a model."""
    return getattr(model, "peft_config", None) or {}


def _is_wrapper(model: nn.Module) -> bool:
    if not is_peft_available():
        return False
    import peft

    return isinstance(model, peft.PeftModel | peft.PeftMixedModel)


def _has_adapter(model: nn.Module) -> bool:
    """Whether adapter layers are in the model itself: from_pretrained of an adapter's folder puts them there."""
    return not _is_wrapper(model) and bool(adapter_configs(model))


def _wrapped(model: Any) -> Any:
    """A peft model, which saves and resumes its adapter, of a model with an adapter's layers in it."""
    peft = import_peft("a model with an adapter in it")
    names = list(model.peft_config)
    way_out = "load its base model and then PeftModel.from_pretrained(base, folder, is_trainable=True)"
    if len(names) > 1 or model.peft_config[names[0]].peft_type != peft.PeftType.LORA:
        raise ValueError(f"the adapters {', '.join(names)} in the model cannot be trained as they are: {way_out}")
    config = model.peft_config[names[0]]
    weights = {key: value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}
    del model.peft_config
    model._hf_peft_config_loaded = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT")
        # an initialization that changes the base model has done so already
        plain = dataclasses.replace(config, init_lora_weights=True, inference_mode=False)
        policy = peft.get_peft_model(model, plain, adapter_name=names[0])
    policy.peft_config[names[0]].init_lora_weights = config.init_lora_weights
    prefixed = {f"base_model.model.{key}": value for key, value in weights.items()}
    peft.set_peft_model_state_dict(policy, prefixed, adapter_name=names[0])
    kept = peft.get_peft_model_state_dict(policy, adapter_name=names[0])
    if prefixed.keys() != kept.keys() or not all(torch.equal(kept[key], prefixed[key].to(kept[key])) for key in kept):
        raise ValueError(f"the adapter in the model cannot be trained as it is: {way_out}")
    return policy.train(model.training)


def _check_kind(config: Any) -> None:
    peft_type = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"{peft_type} adds virtual tokens to the prompt; use LoRA or another adapter of weights")
    if peft_type == "ADALORA":
        raise ValueError(
            "ADALORA adds a loss of its own and changes its ranks from step to step, which this trainer does not do; "
            "use LoRA"
        )


def _check_saved_adapter(policy: Any) -> None:
    """Raise ValueError if an adapter that is saved would not load as the one that was trained.

    Some initializations change the base model's weights, and do so again when the adapter is loaded. Here the adapter
    is made twice on a copy of one layer, with different random numbers: the base weights must come out alike.
    """
    import peft
    from peft.tuners.lora import LoraLayer

    for name, config in policy.peft_config.items():
        layers: list[Any] = [module for module in policy.modules() if isinstance(module, LoraLayer)]
        layers = [module for module in layers if hasattr(module.get_base_layer(), "weight")]
        if not isinstance(getattr(config, "init_lora_weights", None), str) or not layers:
            continue
        layer = min((m.get_base_layer() for m in layers), key=lambda base: base.weight.numel() or torch.inf)
        alone = dataclasses.replace(
            config,
            target_modules=["layer"],
            exclude_modules=None,
            target_parameters=None,
            layers_to_transform=None,
            layers_pattern=None,
            rank_pattern={},
            alpha_pattern={},
            modules_to_save=None,
            trainable_token_indices=None,
        )
        changed = []
        for seed in range(2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                again: Any = nn.ModuleDict({"layer": copy.deepcopy(layer)})
                peft.inject_adapter_in_model(copy.deepcopy(alone), again)
            changed.append(again["layer"].get_base_layer().weight.detach().float())
        if (changed[0] - changed[1]).norm() > 1e-3 * changed[0].norm():
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} of adapter {name!r} changes the base model by random "
                "numbers, so that the adapter, once saved, would load as another model; use 'pissa', 'olora' or True"
            )


def _compute_as_in_training(policy: nn.Module) -> None:
    """Keep bitsandbytes' layers in training mode, where they are as they are on a GPU in both modes.

    On a CPU they have other kernels for evaluation, which round more, and the reference, which runs in that mode, would
    be another model than the policy.
    """
    for module in policy.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.train = types.MethodType(_Steady.train, module)  # type: ignore[method-assign]
            module.train()


# Bound to a module as its `train`.
class _Steady(nn.Module):
    def train(self, mode: bool = True) -> Any:
        self.training = True
        return self


def disable_dropout(model: nn.Module) -> None:
    """Set every option for noise in training mode to zero: in the modules, and in the configs that they read."""
    owners = [*model.modules(), *(m.config for m in model.modules() if isinstance(m, PreTrainedModel))]
    owners += [owner.get_text_config() for owner in owners if hasattr(owner, "get_text_config")]
    for owner in owners:
        if isinstance(owner, nn.modules.dropout._DropoutNd):
            owner.p = 0.0
        for name, value in vars(owner).items():
            if isinstance(value, float) and _NOISE.search(name):
                setattr(owner, name, 0.0)


def max_positions(config: Any) -> int | None:
    """The longest sequence that a model is made for, or None if its config names no limit."""
    config = config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or getattr(config, "alibi", False):
        return None
    for rope in _ropes(config):
        factor = float(rope.get("factor") or 1.0)
        if rope["rope_type"] in ("linear", "dynamic"):
            most = max(most, int(config.max_position_embeddings * factor))
        elif rope["rope_type"] == "yarn":
            most = max(most, int((rope.get("original_max_position_embeddings") or 0) * factor))
    return most


def varies_beyond(config: Any) -> int | None:
    """The length from which on a sequence's log-probs depend on the longest sequence of its batch, or None."""
    config = config.get_text_config()
    for rope in _ropes(config):
        if rope["rope_type"] == "longrope":
            return rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if "dynamic" in rope["rope_type"]:
            return config.max_position_embeddings
    return None


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Options of the rotary positions; of each kind of layer, where these have their own."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [each for each in (rope, *rope.values()) if isinstance(each, dict) and each.get("rope_type")]


def backbone_of(model: PreTrainedModel) -> Any:
    """The part of a causal language model that gives its hidden states.

    A few families (Llama 4's text model) name a prefix that is not there, and are a base_model of their own.
    """
    backbone = model.base_model
    return backbone if backbone is not model else getattr(model, "model", model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and restore its mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
