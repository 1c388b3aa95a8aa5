"""hdpo-train plan: what a step will need, or how long a pair may be."""

import sys
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hdpo_train.config import PlanConfig, ScriptArguments
from hdpo_train.model.loading import (
    add_adapter,
    reading,
    where_from,
)
from hdpo_train.options import TrainingParser, parse_options
from hdpo_train.parser import UsageError
from hdpo_train.plan.fit import print_fit
from hdpo_train.plan.step import Build, print_plan
from hdpo_train.training import lora_config

_DESCRIPTION = """\
What a step will need, by the options of a run: memory by kind, and seconds. Or, with --fit, the longest pair of which a
step fits, what takes the memory there, and which option would lengthen it. Of the model only its config is read, and no
data.

  hdpo-train plan --model_name_or_path MODEL --max_length 2048 --per_device_train_batch_size 4
  hdpo-train plan --model_name_or_path MODEL --gradient_checkpointing True --on cuda --fit 79GiB
"""


def main(argv: list[str]) -> None:
    if not argv:
        raise UsageError(
            "plan needs the options of a run: hdpo-train plan --model_name_or_path MODEL --max_length 2048 …"
        )
    script, args = parse_options(argv, TrainingParser("hdpo-train plan", _DESCRIPTION, (ScriptArguments, PlanConfig)))
    plan(script, cast(PlanConfig, args))


def plan(script: ScriptArguments, args: PlanConfig) -> None:
    """Print what a run with these options needs, or how long its pairs may be."""
    if script.model_name_or_path is None:
        raise ValueError("a plan needs --model_name_or_path; of the model only its config is read")
    if script.load_in_4bit or script.load_in_8bit:
        raise ValueError(
            "a plan knows no quantized weights: leave out load_in_4bit and load_in_8bit; with them, the linear layers' "
            "share of the weights is smaller by that many bits"
        )
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
            return add_adapter(model, lora_config(script)) if script.use_peft else model

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
