"""What HDPOConfig and HDPOTrainer inherit from transformers and cannot use: refused, or named in one warning.

An option that is in none of these tables does what its name says. tests/train/test_inherited.py holds the list of
those that were looked at: a new release of transformers that adds one fails there.
"""

import copy
import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, trainer_log_levels
from transformers.utils import logging

from hdpo_train.metrics import METRICS

logger = logging.get_logger(__name__)

_NO_PREDICTIONS = "no logits are ever held to compute metrics from; a callback's on_evaluate gets those there are"
_PRECISION = "reference, training and evaluation run in one precision, or rewards would be off: use bf16 or fp16"
_BY_LENGTH = "lengths are known here: max_tokens_per_batch N puts pairs of similar length together"

REFUSED = {  # an option that is not at its default: why not, and the way out
    "label_smoothing_factor": "it smooths token labels; for flipped preferences use label_smoothing",
    "neftune_noise_alpha": "noise on the policy's embeddings alone would be noise in every reward; leave it out",
    "logging_nan_inf_filter": "it hides a NaN loss, which stops a run here; leave it out",
    "bf16_full_eval": _PRECISION,
    "fp16_full_eval": _PRECISION,
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "label_names": _NO_PREDICTIONS,
    "length_column_name": _BY_LENGTH,
}
REFUSED_VALUES: tuple[tuple[str, Any, str], ...] = (
    ("max_steps", 0, "it would mean num_train_epochs; leave it out, or give a number of steps"),
    (
        "include_num_input_tokens_seen",
        "non_padding",
        "padding cannot be told from EOS in packed rows; num_tokens of every log line counts none",
    ),
)
NO_EFFECT = {  # what is asked for is so already, or has no object here: one warning
    "average_tokens_across_devices": "every pair of a step weighs the same, whatever its device",
    "eval_accumulation_steps": "evaluation keeps sums and no predictions",
    "eval_do_concat_batches": "evaluation keeps sums and no predictions",
    "remove_unused_columns": "columns that are not those of preference records are never read",
    "do_predict": "there is nothing to predict",
}
NEEDS = {  # an option: the one without which it has no effect, and that one's value if it must be a certain one
    "do_eval": ("eval_strategy", None),
    "eval_delay": ("eval_strategy", None),
    "eval_steps": ("eval_strategy", "steps"),
    "activation_checkpointing_kwargs": ("activation_checkpointing", None),
    "liger_kernel_config": ("use_liger_kernel", None),
    "dataloader_persistent_workers": ("dataloader_num_workers", None),
    "dataloader_multiprocessing_context": ("dataloader_num_workers", None),
    "dataloader_in_order": ("dataloader_num_workers", None),
    "hub_strategy": ("push_to_hub", None),
    "hub_always_push": ("push_to_hub", None),
    "trackio_space_id": ("report_to", "trackio"),
    "trackio_bucket_id": ("report_to", "trackio"),
    "trackio_static_space_id": ("report_to", "trackio"),
    "epsilon": ("gradient", "sampled"),
    "alpha_min": ("target_entropy", None),
    "alpha_max": ("target_entropy", None),
    "entropy_steps": ("target_entropy", None),
    "entropy_prompts": ("target_entropy", None),
}
RANGES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {  # None is allowed where the type says so
    "a positive whole number": (
        lambda value: isinstance(value, Integral) and int(value) > 0,
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit",
        "max_length", "max_prompt_length", "max_tokens_per_batch", "chunk_bytes", "dataset_num_proc",
        "precompute_ref_batch_size", "entropy_steps", "entropy_prompts"),
    ),
    "a whole number from 0 to 4294967295": (
        lambda value: isinstance(value, Integral) and 0 <= int(value) < 2**32,
        ("seed", "data_seed"),
    ),
    "positive": (lambda value: value > 0, ("logging_steps", "eval_steps", "save_steps")),
    "finite and not negative": (
        lambda value: 0 <= value < math.inf,
        ("num_train_epochs", "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps",
        "dataloader_num_workers", "eval_delay", "router_aux_loss_coef"),
    ),
    "at least 0 and less than 1": (lambda value: 0 <= value < 1, ("adam_beta1", "adam_beta2")),
    "from 1e-9 to 1e9 (what fp32 can hold)": (
        lambda value: 1e-9 <= value <= 1e9,
        ("alpha", "beta", "alpha_final", "alpha_min", "alpha_max"),
    ),
}  # fmt: skip
NOT_TAKEN = {  # arguments of Trainer's constructor
    "data_collator": "pairs are laid out by the trainer's own; packing, shared_prompt and max_tokens_per_batch rule it",
    "model_init": "give the model itself, or its name",
    "compute_loss_func": "the loss is H-DPO's; loss_type, label_smoothing and nll_weight change it",
    "compute_metrics": _NO_PREDICTIONS,
    "preprocess_logits_for_metrics": _NO_PREDICTIONS,
}


def check_ranges(args: TrainingArguments) -> None:
    """Raises ValueError for a number that is none or out of range, before transformers calculates with it."""
    hints = typing.get_type_hints(type(args))
    for words, (allowed, names) in RANGES.items():
        for name in names:
            value, or_none = getattr(args, name), type(None) in typing.get_args(hints[name])
            if value is None and or_none:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not allowed(value):
                raise ValueError(f"{name} must be {words}{' or None' if or_none else ''}, got {value!r}")


def check_options(args: TrainingArguments) -> None:
    """Raises ValueError for an option that would do nothing or something else, after transformers' own checks."""
    changed = {
        each.name: getattr(args, each.name)
        for each in dataclasses.fields(args)
        if getattr(args, each.name) != _default(args, each.name)
    }
    changed["do_eval"] = args.do_eval
    for name, value in changed.items():
        values = [reason for other, refused, reason in REFUSED_VALUES if (name, value) == (other, refused)]
        if reason := REFUSED.get(name) or next(iter(values), None):
            raise ValueError(f"{name}={value!r} is not possible here: {reason}")
        other, needed = NEEDS.get(name, (None, None))
        if value and other is not None and not _is_on(getattr(args, other), needed):
            is_needed = f"{other}={needed}" if needed else other
            raise ValueError(f"{name}={value!r} has no effect without {is_needed}: set that, or leave {name} out")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} is not possible here, only random or "
            f"sequential: {_BY_LENGTH}"
        )
    for name in ("log_level", "log_level_replica"):
        if getattr(args, name) not in trainer_log_levels:
            raise ValueError(f"{name}={getattr(args, name)!r} is not known: it can be {', '.join(trainer_log_levels)}")
    for tracker in args.report_to or ():
        _check_tracker(tracker)
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 needs a GPU; on a CPU use bf16, or neither")
    _check_schedule(args)
    if ignored := [f"{name} ({NO_EFFECT[name]})" for name in changed if name in NO_EFFECT]:
        logger.warning(f"these options have no effect here: {'; '.join(ignored)}")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises for arguments of HDPOTrainer that it hands on to Trainer: ValueError for those that it cannot use."""
    for name, value in arguments.items():
        if name in NOT_TAKEN and value is not None:
            raise ValueError(f"{name} has no place here: {NOT_TAKEN[name]}")
        if name not in (*NOT_TAKEN, "optimizer_cls_and_kwargs"):
            raise TypeError(f"HDPOTrainer has no argument {name!r}; options of a run belong into HDPOConfig")


def check_optimizer(args: TrainingArguments, model: Any) -> None:
    """Raises ValueError if the optimizer cannot be made (its package is missing) or ignores what it is given."""
    optim = OptimizerNames(args.optim).value
    try:
        made = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"optim={optim} cannot be used: {error}") from error
    for name in ("optim_args", "optim_target_modules"):
        without = copy.copy(args)
        setattr(without, name, None)
        if getattr(args, name) and str(made) == str(Trainer.get_optimizer_cls_and_kwargs(without, model)):
            raise ValueError(f"{name}={getattr(args, name)!r} has no effect on optim={optim}: leave it out")


def check_best_metric(name: str | None, has_callbacks: bool) -> None:
    """Raises ValueError for a metric_for_best_model that no evaluation gives, unless a callback may add it."""
    if name is not None and not has_callbacks and not name.endswith(tuple(METRICS)):
        raise ValueError(f"metric_for_best_model={name!r} is none of those of an evaluation: {', '.join(METRICS)}")


def _check_schedule(args: TrainingArguments) -> None:
    """Raises ValueError for lr_scheduler_kwargs and warmup_steps that the schedule does not know or ignores."""
    kind, optimizer = SchedulerType(args.lr_scheduler_type), torch.optim.SGD([torch.zeros(1)], lr=1.0)
    kwargs: Any = args.lr_scheduler_kwargs
    try:
        get_scheduler(kind, optimizer, 1, 2, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs={kwargs!r} does not fit lr_scheduler_type={kind.value}: {error}"
        ) from error
    if kwargs and kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        raise ValueError(f"lr_scheduler_kwargs={kwargs!r} has no effect on lr_scheduler_type={kind.value}")
    if args.warmup_steps and optimizer.param_groups[0]["lr"] == 1.0:
        raise ValueError(
            f"warmup_steps={args.warmup_steps} has no effect on lr_scheduler_type={kind.value}: leave it out, or take "
            "a schedule that begins with a warm-up, as constant_with_warmup or linear"
        )


def _check_tracker(name: str) -> None:
    if name not in INTEGRATION_TO_CALLBACK:
        raise ValueError(f"report_to={name!r} is not known: it can be {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
    here = get_available_reporting_integrations()
    if name not in here and name != "flyte":  # which transformers does not look for
        raise ValueError(
            f"report_to={name!r} needs a package that is not installed: pip install it, or report_to="
            f"{' or '.join([*here, 'none'])}"
        )


def _default(args: TrainingArguments, name: str) -> Any:
    field = type(args).__dataclass_fields__[name]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_on(value: Any, needed: str | None) -> bool:
    value = getattr(value, "value", value)
    if needed is None:
        return bool(value) and value != "no"
    return needed in value if isinstance(value, list) else value == needed
