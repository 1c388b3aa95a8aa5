"""What a run can be told: HDPOConfig for the trainer, ScriptArguments for what only the command line needs."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from hdpo_kernels.checks import GRADIENTS, check_gradient
from hdpo_kernels.pair import ALPHA_LEVELS, DIVERGENCES, LOSS_TYPES, PairOptions
from hdpo_train.alpha import SCHEDULES, Target
from hdpo_train.inherited import check_options, check_ranges
from hdpo_train.loss import StepLoss, is_own_loss, load_own_loss
from hdpo_train.model.loading import in_gguf, is_gguf
from hdpo_train.of_trl import taking_options_of_trl
from hdpo_train.ranks import as_parallelism_config, check_dataloading


@dataclass
class HDPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus the preference loss, its data and its reference.

    Names are TRL's DPOConfig's where both have the option. Differences from TrainingArguments' defaults: learning_rate
    1e-6, logging_steps 10, bf16 where a CUDA device supports it, and a NaN loss is an error instead of being filtered.
    Batch sizes count pairs. Raises ValueError for options out of range.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of the optimizer."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Mixed precision in bfloat16. Default: yes on a CUDA device that supports it, else fp32."},
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Keep False: a NaN loss stops the run."})

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "true: go on from the last whole checkpoint in output_dir, or start if there is none; or a "
            "checkpoint's folder."
        },
    )

    alpha: float = field(
        default=1.0,
        metadata={"help": "Weight of the policy's log-probs. < 1 sharpens (less entropy), 1 is DPO, > 1 diversifies."},
    )
    alpha_level: str = field(
        default="sequence",
        metadata={
            "help": "What alpha weighs: sequence, the sum of a response's log-probs, as in the paper; or token, their "
            "mean per token (times the pair's mean length), so that responses of unequal length are not pushed apart "
            "by their lengths alone. The same where lengths are equal.",
            "choices": ALPHA_LEVELS,
        },
    )
    alpha_schedule: str = field(
        default="constant",
        metadata={"help": "alpha over the steps: constant, or linear or cosine to alpha_final.", "choices": SCHEDULES},
    )
    alpha_final: float | None = field(default=None, metadata={"help": "alpha of the last step, with a schedule."})
    target_entropy: str | None = field(
        default=None,
        metadata={
            "help": "Steer alpha so that the entropy of the policy's own answers reaches this: a share of what it is "
            "before training ('0.9', '90%%') or nats per token ('0.65 nats'). alpha is then where steering starts."
        },
    )
    alpha_min: float = field(default=0.5, metadata={"help": "Lowest alpha that target_entropy may set."})
    alpha_max: float = field(default=2.0, metadata={"help": "Highest alpha that target_entropy may set."})
    entropy_steps: int | None = field(
        default=None,
        metadata={
            "help": "With target_entropy: measure, and set alpha, every so many optimizer steps. Default: 40 times in "
            "a run, and at least every 10 steps."
        },
    )
    entropy_prompts: int = field(
        default=128,
        metadata={"help": "With target_entropy: training prompts that the policy answers to be measured, once each."},
    )
    beta: float = field(default=0.1, metadata={"help": "Pull to the reference: higher stays closer."})
    loss_type: list[str] | str = field(
        default="sigmoid",
        metadata={
            "help": "sigmoid (DPO / H-DPO), or another loss or several: " + ", ".join(LOSS_TYPES[1:]) + "; or "
            "file.py:function, called with policy (times alpha) and reference log-probs and lengths, (S,) each, chosen "
            "and rejected in turn, which returns a loss for each pair.",
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of several losses in their sum. Default: 1 each."}
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": "Divergence from the reference, for losses of a margin.", "choices": DIVERGENCES},
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"help": "Order of --f_divergence_type alpha_divergence."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of the loss discopop."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Probability that a preference label is flipped, in [0, 0.5)."}
    )
    nll_weight: float = field(
        default=0.0, metadata={"help": "Adds this times the chosen responses' mean NLL per token (RPO)."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Adds this times the router's loss of a mixture of experts, which spreads tokens over the experts. "
            "Default: the coefficient in the model's config. 0: train without it."
        },
    )
    gradient: str = field(
        default="exact",
        metadata={
            "help": "exact, or sampled: each token's softmax in the gradient is rounded, at random and without bias, "
            "to a few entries: one matrix product in the head and two sparse ones, not three. Metrics stay exact.",
            "choices": GRADIENTS,
        },
    )
    epsilon: float = field(
        default=2**-10,
        metadata={
            "help": "Of --gradient sampled, in (0, 0.5]: probabilities from it on are kept as they are, smaller ones "
            "rounded to 0 or to it. At most 1/epsilon + 2 entries a token: smaller is less noise and more of them."
        },
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Most tokens of prompt + completion; the end is cut. None: no cut."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a prompt; its beginning is cut. None: no cut."}
    )
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Lay sequences end to end instead of padding them. Default: where a probe finds that the model's "
            "attention keeps them apart, else padded, with a warning. True: stop if it does not."
        },
    )
    parallelism_config: dict | str | None = field(
        default=None,
        metadata={
            "help": 'How processes share the work, as accelerate\'s ParallelismConfig or in JSON: {"sp_size": 2} lets '
            "two of them share every sequence, for pairs that do not fit on one GPU."
        },
    )
    shared_prompt: bool | None = field(
        default=None,
        metadata={
            "help": "Compute a prompt once for chosen and rejected. Default: where the attention implementation can "
            "(sdpa, eager, flex_attention). True: stop if it cannot. False: never."
        },
    )
    tiled_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Run MLPs on 4,096 tokens at a time, and layers whose activations are checkpointed on one sequence "
            "after the other: less memory for long sequences, for a little more time. Default: where a step on the "
            "longest pairs would not fit into the memory of the device otherwise."
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a micro-batch per device, pairs of similar length together; "
            "per_device_train_batch_size is then the most pairs it may have. Every pair of an optimizer step weighs "
            "the same, however many there are. A longer pair is a batch of its own. Default: no limit."
        },
    )
    on_bad_record: str = field(
        default="stop",
        metadata={
            "help": "What to do with records that cannot be trained on (empty, identical, truncated away): 'stop' "
            "with a list of line numbers, or 'drop' them and go on.",
            "choices": ["stop", "drop"],
        },
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes for tokenizing."})
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs per batch of the reference pass. Default: the training batch size."}
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of cached reference log-probs. Default: hdpo_reference in the Hugging Face cache."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set every dropout to zero, so that the policy starts equal to its reference."},
    )
    chunk_bytes: int | None = field(
        default=None, metadata={"help": "Most bytes of logits and their gradient held at a time. Default: by device."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keywords of from_pretrained for a model given by name (JSON on the CLI)."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete the run that output_dir holds when this one begins to train, instead of refusing."},
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
    ]

    def __post_init__(self) -> None:
        self.parallelism_config = as_parallelism_config(self.parallelism_config)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and self._has_bf16()
        check_ranges(self)
        super().__post_init__()
        check_options(self)
        check_dataloading(self.accelerator_config, self.world_size)  # type: ignore[arg-type]
        self.step_loss()  # raises for values out of range
        self._check_alpha()
        check_gradient(self.gradient, self.epsilon)
        if self.on_bad_record not in ("stop", "drop"):
            raise ValueError(f"on_bad_record must be 'stop' or 'drop', got {self.on_bad_record!r}")
        liger = self.liger_kernel_config if isinstance(self.liger_kernel_config, dict) else {}
        if self.use_liger_kernel and liger.get("fused_linear_cross_entropy") is not False:
            raise ValueError(
                "use_liger_kernel replaces the model's forward, where the loss is computed; keep its other kernels by "
                "liger_kernel_config={'fused_linear_cross_entropy': False, 'cross_entropy': False}"
            )
        checkpointing = self.gradient_checkpointing_kwargs
        if isinstance(checkpointing, dict) and checkpointing.get("offload"):
            if not self.gradient_checkpointing:
                raise ValueError("offload moves what checkpointed layers keep: set gradient_checkpointing too")
            if self.device.type == "cpu":
                raise ValueError("offload moves activations to the host, and on a CPU they are there: leave it out")
        if self.packing is False and self.shared_prompt:
            raise ValueError("shared_prompt=True lays prompt, chosen and rejected end to end; leave out packing=False")
        if self.max_tokens_per_batch is not None:
            for name, default in (("train_sampling_strategy", "random"), ("dataloader_drop_last", False)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"max_tokens_per_batch makes its own batches, of every pair and by length: leave out {name}"
                    )
            if self.auto_find_batch_size:
                raise ValueError("auto_find_batch_size does not lower max_tokens_per_batch; leave out one of the two")

    def _has_bf16(self) -> bool:
        return torch.cuda.is_available() and not self.use_cpu and torch.cuda.is_bf16_supported()

    def _check_alpha(self) -> None:
        if self.alpha_schedule not in SCHEDULES:
            raise ValueError(f"alpha_schedule must be one of {', '.join(SCHEDULES)}; got {self.alpha_schedule!r}")
        if (self.alpha_schedule == "constant") != (self.alpha_final is None):
            raise ValueError(
                f"alpha_final is where a linear or cosine alpha_schedule ends, got alpha_schedule="
                f"{self.alpha_schedule!r} and alpha_final={self.alpha_final}"
            )
        if self.target_entropy is None:
            return
        Target.parse(self.target_entropy)
        if self.alpha_schedule != "constant":
            raise ValueError("target_entropy sets alpha itself: leave out alpha_schedule and alpha_final")
        if not self.alpha_min <= self.alpha <= self.alpha_max:
            raise ValueError(
                f"alpha_min <= alpha <= alpha_max is needed with target_entropy, got {self.alpha_min}, "
                f"{self.alpha} and {self.alpha_max}"
            )

    @property
    def device(self) -> torch.device:
        """The device of this process. A CPU has no number: resuming loads to it, and torch knows no "cpu:0"."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def pair_options(self) -> PairOptions:
        """Options of the loss; with a loss of the user's, those that do not depend on it."""
        options = {each.name: getattr(self, each.name) for each in fields(PairOptions)}
        return PairOptions(**{**options, **({"loss_type": "sigmoid"} if is_own_loss(self.loss_type) else {})})

    def step_loss(self) -> StepLoss:
        """The loss of the first step."""
        head = {name: getattr(self, name) for name in ("gradient", "epsilon", "chunk_bytes")}
        own = load_own_loss(str(self.loss_type)) if is_own_loss(self.loss_type) else None
        return StepLoss(self.pair_options, head, own)


HDPOConfig.__init__ = taking_options_of_trl(HDPOConfig.__init__)  # type: ignore[method-assign]


@dataclass
class PlanConfig(HDPOConfig):
    """A run that is planned, perhaps for a device that is not here."""

    fit: str | None = field(
        default=None,
        metadata={
            "help": "Print the longest pair of which a step fits into so much memory of one process: 79GiB, 79GB or "
            "80e9 bytes. Without a size: what is free on this GPU now."
        },
    )
    shards: int = field(
        default=1,
        metadata={
            "help": "Processes among which FSDP2 shares out weights, gradients and optimizer. With "
            "--parallelism_config '{\"sp_size\": N}', N of them also share every sequence."
        },
    )
    on: str | None = field(
        default=None,
        metadata={
            "help": "Plan for this kind of device, which need not be here. Default: the run's.",
            "choices": ["cpu", "cuda"],
        },
    )

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or self.on is not None  # transformers refuses options of a GPU where there is none
        super().__post_init__()
        if self.shards < 1:
            raise ValueError(f"shards must be 1 or more, got {self.shards}")

    @property
    def sp_size(self) -> int:
        """Processes that share every sequence."""
        config: Any = self.parallelism_config
        return 1 if config is None else config.sp_size

    @property
    def device(self) -> torch.device:
        own = super().device  # sets up what transformers wants of a device
        return own if self.on is None else torch.device(self.on)

    def _has_bf16(self) -> bool:
        return super()._has_bf16() if self.on is None else self.on == "cuda"


@dataclass
class ScriptArguments:
    """The model and the data of a run started from the command line."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Policy and reference: a local folder or a hub id, or a GGUF file in one."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Preference pairs: a JSONL or Parquet file, a folder of them, or a hub id."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on. Default: none."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "A file or hub id to evaluate on instead."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "dtype of the weights. float32 with bf16 autocast is the safe choice: at learning rates of 1e-6, "
            "bfloat16 weights round most updates away.",
            "choices": ["float32", "bfloat16", "float16", "auto"],
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2 …"})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})
    use_peft: bool = field(
        default=False,
        metadata={
            "help": "Train LoRA adapters; the base model is the reference. A model that is an adapter is trained on."
        },
    )
    lora_r: int | None = field(default=None, metadata={"help": "LoRA rank. Default: 16."})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA scale. Default: 32."})
    lora_dropout: float | None = field(default=None, metadata={"help": "LoRA dropout. Default: 0."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get an adapter: their names, or one regular expression. Default: all linear layers "
            "but the head."
        },
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "With use_peft: the base model's linear layers, the head excepted, in 4 bits."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "The same in 8 bits (LLM.int8)."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "The numbers that 4 bits stand for.", "choices": ["nf4", "fp4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "With load_in_4bit: quantize the scales too, 0.4 bits fewer for each weight."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata={"help": "With load_in_4bit: dtype of the tensors that hold the bits. Default: uint8."}
    )
    gguf_file: str | None = field(
        default=None,
        metadata={
            "help": "GGUF file in that folder or repository: its weights are dequantized, and the model that is saved "
            "is an ordinary one."
        },
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name.startswith("lora_") and value != each.default and not self.use_peft:
                raise ValueError(f"{each.name}={value!r} has no effect without use_peft: set that, or leave it out")
        self._check_quantization()
        if self.gguf_file is not None:
            if self.model_name_or_path is None:
                raise ValueError(f"gguf_file={self.gguf_file!r} is a file of the model: give model_name_or_path too")
            self.model_name_or_path, self.gguf_file = in_gguf(self.model_name_or_path, self.gguf_file), None

    def _check_quantization(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are given: a model is loaded in one of the two")
        for name, default in (
            ("bnb_4bit_quant_type", "nf4"), ("use_bnb_nested_quant", False), ("bnb_4bit_quant_storage", None),
        ):  # fmt: skip
            if (value := getattr(self, name)) != default and not self.load_in_4bit:
                raise ValueError(f"{name}={value!r} has no effect without load_in_4bit: set that, or leave it out")
        if not (self.load_in_4bit or self.load_in_8bit):
            return
        given = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
        if not self.use_peft:
            raise ValueError(f"{given} rounds the model's weights, which cannot be trained so: set use_peft (QLoRA)")
        if self.gguf_file is not None or is_gguf(self.model_name_or_path or ""):
            raise ValueError(f"{given} is not for a GGUF file, whose weights are dequantized: leave out one of the two")
