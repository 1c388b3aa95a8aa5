"""hdpo-train train: a run of the trainer."""

import gc

import torch.distributed as dist

from hdpo_train.options import TrainingParser, parse_options
from hdpo_train.training import train

_DESCRIPTION = """\
Trains a causal language model on preference pairs with H-DPO: DPO with control over entropy by one number, alpha.

  hdpo-train --model_name_or_path MODEL --dataset_name pairs.jsonl --alpha 0.95 --output_dir out
                                                      train; MODEL and data are local paths or hub ids
  hdpo-train run.yaml --learning_rate 5e-7            the options of a YAML file, some overridden
  hdpo-train … --resume_from_checkpoint               go on from the last whole checkpoint in output_dir, or start if
                                                      there is none: the same command after any crash
  hdpo-train plan …                                   the same options: the memory and the time that a step will need

Records: {"prompt", "chosen", "rejected"} as strings or chat messages; the prompt may be left out where both completions
begin with it. A run leaves the model, metrics.jsonl and report.png in output_dir.
"""


def main(argv: list[str]) -> None:
    train(*parse_options(argv, TrainingParser(description=_DESCRIPTION)))
    if dist.is_initialized():
        # The group outlives this in the trainer's cycles; a thread of gloo that meets Python's end ends in SIGABRT.
        gc.collect()
        dist.destroy_process_group()
