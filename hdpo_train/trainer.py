"""HDPOTrainer: transformers.Trainer with the H-DPO loss, packed batches and a reference that is never in memory."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from hdpo_kernels import HDPOLoss
from hdpo_kernels.checks import check_gradient
from hdpo_train.alpha import AlphaSchedule, EntropyControl, Target
from hdpo_train.config import HDPOConfig
from hdpo_train.data.own_reference import COLUMNS, OF_TRL
from hdpo_train.data.records import training_split
from hdpo_train.data.sampler import TokenBudgetSampler
from hdpo_train.data.tokenize import PairCollator, pair_lengths, pair_tokens
from hdpo_train.inherited import check_arguments, check_best_metric, check_optimizer
from hdpo_train.metrics import batch_sums, finite, means
from hdpo_train.model.generation import own_entropy
from hdpo_train.model.head import attach_loss, bare, model_inputs
from hdpo_train.model.loading import adapter_configs, check_trainable, load_model, load_tokenizer, make_policy
from hdpo_train.model.packing import Layout, find_layout
from hdpo_train.model.router import check_router_loss, router_coefficient
from hdpo_train.model.sequence_ranks import check_model, probe
from hdpo_train.model.tiles import tile_sequences, tile_tokens
from hdpo_train.plan.room import wants_tiles
from hdpo_train.ranks import (
    OwnRandomNumbers,
    data_ranks,
    gathered,
    keep_output_dtype,
    own_pairs,
    sequence_ranks,
    shards,
    together,
    weights,
    without_sequence_ranks,
)
from hdpo_train.run.card import CARD_FILE, model_card, write_card
from hdpo_train.run.output_dir import refuse_base_model
from hdpo_train.run.report import RunReport, mean_loss
from hdpo_train.run.resuming import ResumableTrainer
from hdpo_train.run.sigterm import StopAtSigterm
from hdpo_train.start import Tokenized, margins_before_training, vocabulary, with_checked_reference

logger = logging.get_logger(__name__)


class HDPOTrainer(ResumableTrainer):
    """Trains a causal language model on preference pairs with the H-DPO loss (arXiv 2411.07595).

    The constructor, data set columns and metric names are those of TRL's DPOTrainer.

    Args:
        model: an AutoModelForCausalLM, a peft model, or a name (local folder or hub id; loaded with
            args.model_init_kwargs, in fp32 unless they say otherwise).
        ref_model: the reference policy; default: the policy as it is now (for a peft_config: without the adapter). Its
            log-probabilities of both data sets are computed here, once, and it is not kept.
        args: an HDPOConfig.
        train_dataset: columns prompt / chosen / rejected, standard or conversational, or chosen / rejected with a
            common beginning. If ref_chosen_logp and ref_rejected_logp are both there, they are taken as the reference.
        eval_dataset: the same, or a dict of data sets by name.
        processing_class: the tokenizer; default: loaded by the model's name.
        peft_config: train an adapter.
        callbacks, optimizers: as in transformers.Trainer.

    Metrics: rewards/chosen, rewards/rejected (α-weighted, β(αℓ − ρ)), rewards/accuracies, rewards/margins,
    rewards/initial_margins ((α − 1)β(ρ_w − ρ_l): the margin of an untrained policy; both with α_s = 1 + (α − 1) n̄/n_s
    in α's place where alpha_level is "token"), logps/chosen, logps/rejected, entropy, entropy/chosen, entropy/rejected
    (nats per completion token), mean_token_accuracy (share of the chosen completions' tokens that are the policy's
    likeliest), logits/chosen, logits/rejected (mean over tokens and vocabulary; missing where a softcap is on them),
    aux_loss (of the routers of a mixture of experts), num_tokens (of prompt and completion of all sequences so far: the
    same number whatever the layout).

    Raises:
        ValueError: a head that cannot be represented, data that cannot be trained on, options out of range.
    """

    args: HDPOConfig
    entropy_control: EntropyControl | None = None  # with target_entropy
    _sums: list[Tensor] | None = None  # where the metrics of the batches go whose loss is being computed

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        ref_model: PreTrainedModel | nn.Module | None = None,
        args: HDPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **trainer_kwargs: Any,
    ) -> None:
        args = HDPOConfig(output_dir="hdpo-output") if args is None else args
        _check_call(args, model, ref_model, train_dataset, eval_dataset, callbacks, trainer_kwargs)
        args, self.sp_size = without_sequence_ranks(args)
        name = model if isinstance(model, str) else bare(model).config._name_or_path
        if train_dataset is not None:
            refuse_base_model(str(args.output_dir), [name, *map(_source, (ref_model, processing_class))])
        tokenizer = processing_class if processing_class is not None else load_tokenizer(name)
        loaded = load_model(model, args.model_init_kwargs) if isinstance(model, str) else model  # type: ignore[arg-type]
        policy = make_policy(loaded, peft_config, quiet=args.disable_dropout)
        if train_dataset is not None:
            check_trainable(policy)
        if optimizers[0] is None and not trainer_kwargs.get("optimizer_cls_and_kwargs"):
            check_optimizer(args, policy)
        reference: Any = policy if ref_model is None else ref_model
        models: list[Any] = [policy] if reference is policy else [policy, reference]
        bare_models = [bare(each) for each in models]
        check_gradient(args.gradient, args.epsilon, vocabulary(bare_models))
        tokenized = Tokenized(tokenizer, args, bare_models)
        super().__init__(
            model=policy,
            args=args,
            train_dataset=_map_datasets(training_split(train_dataset), tokenized, "train"),
            eval_dataset=_map_datasets(eval_dataset, tokenized, "eval"),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            **trainer_kwargs,
        )
        self._prepare_processes()
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the micro-batch's pairs, and
        self.loss_is_scaled_for_ga = False  # Trainer divides it by the number of accumulation steps
        self._trained: list[Tensor] = []  # sums of the batches since the last log
        self.loss = args.step_loss()
        self.router = router_coefficient(bare(policy), args, self.sp_size)
        self._attach_loss(models)
        self.layout = self._find_layout(models, tokenized.longest)
        self.tiled = self._use_tiles(models)
        self.data_collator = PairCollator(_pad_token_id(tokenizer), self.layout)
        self._add_reference_logps(policy, reference, new_adapter=peft_config is not None and reference is policy)
        self._add_callbacks()

    def _prepare_processes(self) -> None:
        """Raises ValueError for several GPUs in one process, and for losses that cannot be split."""
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would be nn.DataParallel, which cannot split packed pairs: "
                "start one process per GPU (accelerate launch -m hdpo_train, or torchrun), or set CUDA_VISIBLE_DEVICES"
            )
        if self.sp_size > 1 and self.args.step_loss().own is not None:
            raise ValueError(
                f"loss_type {self.args.loss_type} is a function of your own, which gets log-probs of whole sequences: "
                f"with sp_size={self.sp_size} use a loss that has a name"
            )
        self.sequence_ranks = sequence_ranks(self.sp_size)
        self.data_ranks = data_ranks(self.accelerator, self.sequence_ranks)
        keep_output_dtype(self.accelerator)
        if self.args.gradient == "sampled" and self.accelerator.num_processes > 1:
            self.add_callback(OwnRandomNumbers(self.accelerator, self.args.seed))

    def _attach_loss(self, models: list[Any]) -> None:
        for each in models:
            if each is not self.model and self.place_model_on_device:
                each.to(self.args.device)
            with gathered(each):
                attach_loss(bare(each))
        if self.router:
            with gathered(models[0]):
                check_router_loss(bare(models[0]))

    def _find_layout(self, models: list[Any], longest: int) -> Layout:
        with contextlib.ExitStack() as stack:
            for each in models:
                stack.enter_context(gathered(each))
            bare_models = [bare(each) for each in models]
            layout = find_layout(bare_models, self.args.packing, self.args.shared_prompt, longest)
            if self.sequence_ranks is not None:
                for each in bare_models:
                    check_model(each, layout, self.sp_size, longest)
                    together(functools.partial(probe, each, layout, self.sequence_ranks))
            return layout

    def _add_reference_logps(self, policy: Any, reference: Any, *, new_adapter: bool) -> None:
        """Add the reference's log-probs to both data sets. The reference itself is not kept."""
        args = self.args

        def refer(dataset: Dataset, name: str) -> Dataset:
            return with_checked_reference(
                dataset,
                policy,
                reference,
                accelerator=self.accelerator,
                collator=self.data_collator,  # type: ignore[arg-type]
                batch_size=args.precompute_ref_batch_size or args.train_batch_size,
                chunk_bytes=args.chunk_bytes,
                sequence_ranks=self.sequence_ranks,
                cache_dir=args.ref_cache_dir,
                name=name,
                new_adapter=new_adapter,
                noise=not args.disable_dropout or self.train_dataset is None,
            )

        self.train_dataset = _map_datasets(self.train_dataset, refer, "train")
        self.eval_dataset = _map_datasets(self.eval_dataset, refer, "eval")

    def _add_callbacks(self) -> None:
        """Add the callbacks that set alpha, write metrics.jsonl and report.png, and stop at SIGTERM."""
        args = self.args
        if self.train_dataset is not None:
            self.start = self._start()
            if args.alpha_final is not None:
                self.add_callback(AlphaSchedule(self.loss, args.alpha_schedule, args.alpha_final))
            if args.target_entropy is not None:
                self.entropy_control = self._entropy_control(args.target_entropy)
                self.add_callback(self.entropy_control)
            self.add_callback(RunReport(self.start))
        if args.enable_jit_checkpoint:
            StopAtSigterm.instead_of_transformers(self)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save also, per rank, the sums since the last log line, so that the next line is right after resuming."""
        super()._save_rng_state(output_dir)
        if self._trained:
            since = {"sums": torch.stack(self._trained).cpu(), "loss": self._tr_loss.cpu()}
            torch.save({**since, "step": self._globalstep_last_logged}, self._since_last_log(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._since_last_log(checkpoint).exists():
            since = torch.load(self._since_last_log(checkpoint), weights_only=True)
            self._trained = list(since["sums"].to(self.args.device))
            self._tr_loss += since["loss"].to(self.args.device)
            self._globalstep_last_logged = since["step"]

    def _since_last_log(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"since_last_log_{self.args.process_index}.pt"

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        _refuse_without_reference(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Metrics of a data set; there are no predictions. Raises ValueError if it is none of the trainer's own."""
        _refuse_without_reference(test_dataset)
        return super().predict(test_dataset, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ranks = self.sequence_ranks
        of_model = model_inputs(inputs, self.accelerator.device, self.loss.keywords, ranks, self.router)
        result: HDPOLoss = model(**of_model)
        weight = inputs.get("weight", 1.0)  # 0: the pair is a repeat
        copies = self.sp_size  # processes that have this batch
        if self._sums is not None:
            pairs = of_model["pairs"]
            logits = None if pairs.logits is None else copies * pairs.logits  # each copy has those of its own tokens
            sums = batch_sums(result, inputs, self.loss.pairs, pairs.aux_loss, logits)
            self._sums.append(sums * ((weight > 0) / copies))
        loss = result.loss * weight
        if copies > 1:  # each has its part of the gradient, and the engine takes the mean over all processes
            loss = loss + (copies - 1) * (loss - loss.detach())
        return (loss, result) if return_outputs else loss

    @contextlib.contextmanager
    def _summing(self, sums: list[Tensor]) -> Iterator[list[Tensor]]:
        """Add the metrics of batches whose loss is computed inside to `sums`; nested uses restore the outer one."""
        outer, self._sums = self._sums, sums
        try:
            yield sums
        finally:
            self._sums = outer

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._trained.clear()  # auto_find_batch_size comes here again for each try
        if (
            self.tiled
            and getattr(self.accelerator, "is_fsdp2", False)
            and "__call__" in vars(GradientCheckpointingLayer)
        ):
            # this transformers gathers shards within a checkpoint, and so once for each sequence
            logger.warning("tiled_layers: layers run on all sequences at once; transformers 5.23 or later is needed")
        elif self.tiled and self.sequence_ranks is None:
            tile_sequences(self.model)  # type: ignore[arg-type]
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._summing(self._trained):
            return super().training_step(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The loop of `evaluate` and `predict`. Loss and metrics are means over the pairs, whatever the batches."""
        with self._summing([]) as sums:
            output: Any = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        metrics = means(sums, self.accelerator)
        del metrics["num_tokens"]
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in metrics.items()})
        return output

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """A step's micro-batches, without repeated pairs, and each with its weight in the step."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        pairs = [_num_pairs(batch) for batch in batches]
        if batches and self.args.max_tokens_per_batch is None:  # its batches are never filled up by accelerate
            batches[-1], pairs[-1] = self._without_repeats(batches[-1])
        shares = weights(pairs, self.accelerator)
        return [{**batch, "weight": share} for batch, share in zip(batches, shares, strict=True)], num_items

    def _without_repeats(self, batch: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The batch without accelerate's duplicated pairs, and how many are left; one stays so that the rank runs."""
        pairs = own = _num_pairs(batch)
        if not self.args.dataloader_drop_last:
            own = own_pairs(pairs, self.data_ranks)
        return (batch if own == pairs else self.data_collator(batch["examples"].rows[: max(own, 1)])), own  # type: ignore[misc]

    def _load_best_model(self) -> None:
        adapter = next(iter(adapter_configs(self.model)), "default")  # type: ignore[arg-type]
        if adapter == "default" or shards(self.accelerator):
            super()._load_best_model()
        else:  # in a folder of its own, where Trainer looks when it resumes, but not here
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _prepare_input(self, data: Any) -> Any:
        # never to another dtype, as Trainer does under DeepSpeed: reference log-probs in bf16 are wrong by nats
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        if args.max_tokens_per_batch is None:
            return super().get_train_dataloader()
        sampler = TokenBudgetSampler(
            pair_tokens(self.train_dataset, self.layout),
            args.max_tokens_per_batch,
            max_pairs=args.train_batch_size,
            padded=not self.layout.packed,
            ranks=self.data_ranks.num_processes,
            seed=args.seed if args.data_seed is None else args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
        )
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            generator=torch.Generator(),  # torch's own is left as it is: it drew nothing for these batches
        )
        return self.accelerator.prepare(loader)

    def get_total_train_batch_size(self, args: Any) -> int:
        return super().get_total_train_batch_size(args) // self.sp_size

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["prompt_ids", "chosen_ids", "rejected_ids", *COLUMNS]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs, pairs = self._without_repeats(inputs)
        inputs = {**self._prepare_inputs(inputs), "weight": float(pairs > 0)}
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        of_training = "loss" in logs and bool(self._trained)
        if of_training:
            metrics = means(self._trained, self.accelerator)
            self._trained.clear()
            seen = next((line["num_tokens"] for line in self.state.log_history[::-1] if "num_tokens" in line), 0)
            metrics["num_tokens"] += seen
            logs.update({**metrics, "loss": logs["loss"], "alpha": self.loss.alpha})
            if self.entropy_control is not None:
                logs.update(self.entropy_control.metrics())
        if "train_loss" in logs:  # Trainer's counts from the last resume on
            logs["train_loss"] = mean_loss(self.state.log_history) or logs["train_loss"]
        super().log(logs, start_time)
        if of_training:
            self._stop_where_broken(logs)

    def _stop_where_broken(self, logs: dict[str, float]) -> None:
        """Raises FloatingPointError if the loss or the weights are not finite any more; nothing reads them more often
        than they are logged or saved."""
        at = f"at step {self.state.global_step}"
        way_out = "lower learning_rate, or train in bf16 or fp32 if this is fp16"
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss is {logs['loss']} {at}: {way_out}; a NaN at the first step means that the model or its "
                "weights produce it"
            )
        if not finite(self.model, self.accelerator):  # type: ignore[arg-type]
            gradient = f"; the last step's gradient norm is {logs['grad_norm']}" if "grad_norm" in logs else ""
            raise FloatingPointError(
                f"some weights are NaN or infinite {at} ({way_out}){gradient}. They are not saved: an earlier "
                "checkpoint stays the last one"
            )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._stop_where_broken({})
        super()._save_checkpoint(*args, **kwargs)

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset: Any = None, **metadata: Any
    ) -> None:
        """README.md beside the model: what it was trained from, on and with. One that somebody has changed stays.

        model_name: default: the name of output_dir. dataset: names of the data. metadata: language, license, tags.
        """
        trained = any("loss" in line for line in self.state.log_history)  # by this trainer, and not only evaluated
        if not self.is_world_process_zero() or not trained:
            return
        folder = Path(str(self.args.output_dir))
        inner = bare(self.model)  # type: ignore[arg-type]
        library = "transformers" if inner is self.model else "peft"
        given = {name: value for name, value in metadata.items() if value is not None}
        names = [dataset] if isinstance(dataset, str) else list(dataset or [])
        text = model_card(
            model_name or folder.resolve().name,
            inner.config._name_or_path,
            self.start,
            self.state.log_history,
            datasets=names,
            library_name=library,
            **given,
        )
        if not write_card(folder, text):
            logger.warning(f"{folder / CARD_FILE} is not of this trainer, and stays as it is: no model card is written")

    def _use_tiles(self, models: list[Any]) -> bool:
        """Run MLPs and norms in tiles, if asked for or if a step would not fit otherwise. Returns whether they do."""
        args, wanted = self.args, self.args.tiled_layers
        if is_deepspeed_zero3_enabled():
            if wanted:
                raise ValueError(
                    "tiled_layers cannot be used with ZeRO-3, where all ranks must call a layer's modules equally "
                    "often, and their sequences differ in length: leave it out, or use FSDP2 (configs/fsdp2.yaml)"
                )
            return False
        if wanted is None and self.train_dataset is not None:
            lengths = pair_lengths(self.train_dataset)  # type: ignore[arg-type]
            sharded = self.accelerator.num_processes if getattr(self.accelerator, "is_fsdp2", False) else 1
            wanted = wants_tiles(models[0], args, self.layout, lengths, sharded, self.sp_size)
        if wanted:
            for each in models:
                if reason := tile_tokens(bare(each), refuse=bool(args.tiled_layers)):
                    logger.warning(f"tiled_layers: {reason}, and stay as they are")
        return bool(wanted)

    def _entropy_control(self, target: str) -> EntropyControl:
        args, data = self.args, self.train_dataset
        if shards(self.accelerator):
            raise ValueError(
                "target_entropy lets the policy answer prompts while it is trained, which takes whole weights on every "
                "GPU: use DDP, or leave it out under FSDP and DeepSpeed"
            )
        longest = max(len(ids) for side in ("chosen_ids", "rejected_ids") for ids in data[side][:])  # type: ignore[index]
        every = max(len(data) // args.entropy_prompts, 1)  # type: ignore[arg-type]
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        prompts = data[::every]["prompt_ids"][rank : args.entropy_prompts : ranks]  # type: ignore[index]
        tokenizer: Any = self.processing_class

        def probe(model: Any) -> tuple[float, int]:
            """Sum of nats, and tokens, over all ranks, each with prompts and random numbers of its own."""
            with self.compute_loss_context_manager():
                nats, tokens = own_entropy(model, tokenizer, prompts, longest, args.seed + rank)
            sums = self.accelerator.reduce(torch.tensor([nats, tokens], device=self.accelerator.device), "sum")
            return sums[0].item(), int(sums[1])

        return EntropyControl(
            self.loss,
            Target.parse(target),
            probe,
            bounds=(args.alpha_min, args.alpha_max),
            every=args.entropy_steps,
        )

    def _start(self) -> dict[str, Any]:
        """The first line of metrics.jsonl: what the run starts from."""
        args = self.args
        margins, warnings = margins_before_training(self.train_dataset, args.pair_options)  # type: ignore[arg-type]
        if self.is_world_process_zero():
            for warning in warnings:
                logger.warning(warning)
        return {
            "pairs": len(margins),
            "alpha": args.alpha,
            "alpha_level": args.alpha_level,
            "beta": args.beta,
            "loss_type": " + ".join([args.loss_type] if isinstance(args.loss_type, str) else args.loss_type),
            "layout": str(self.layout),
            "initial_margin": margins.mean().item(),
            "initial_margin_largest": margins.abs().max().item(),
        }


def _check_call(
    args: HDPOConfig,
    model: Any,
    ref_model: Any,
    train_dataset: Any,
    eval_dataset: Any,
    callbacks: Any,
    trainer_kwargs: dict[str, Any],
) -> None:
    """Raises ValueError or TypeError for arguments of the constructor that do not go together."""
    if not isinstance(args, HDPOConfig):
        raise TypeError(f"args must be an HDPOConfig, got {type(args).__name__}")
    if train_dataset is None and eval_dataset is None:
        raise ValueError("neither train_dataset nor eval_dataset given")
    check_arguments(trainer_kwargs)
    check_best_metric(args.metric_for_best_model, bool(callbacks))
    if ref_model is not None and ref_model is model:
        raise ValueError("ref_model is the model itself; leave it out to use the policy as it is now as reference")
    if args.model_init_kwargs and not isinstance(model, str):
        raise ValueError(f"model_init_kwargs={args.model_init_kwargs!r} come too late for a model: give its name")
    if ref_model is not None:
        for dataset, kind in ((train_dataset, "train"), (eval_dataset, "eval")):
            _map_datasets(dataset, _refuse_two_references, kind)


def _source(part: Any) -> str | None:
    """Where a model or tokenizer was loaded from."""
    return getattr(part, "name_or_path", None) or getattr(getattr(part, "config", None), "_name_or_path", None)


def _refuse_without_reference(dataset: Any) -> None:
    if isinstance(dataset, Dataset) and not {*COLUMNS, "prompt_ids"} <= set(dataset.column_names):
        raise ValueError(
            "reference log-probs are computed when the trainer is made, while the reference is at hand: "
            "give this data set as eval_dataset to HDPOTrainer"
        )


def _refuse_two_references(dataset: Any, name: str) -> None:
    if own := [column for column in (*COLUMNS, *OF_TRL) if column in (getattr(dataset, "column_names", None) or ())]:
        raise ValueError(
            f"ref_model is given, and the {name} set has reference log-probs of its own: leave ref_model out to use "
            f"those, or the columns, as in dataset.remove_columns({own})"
        )


def _num_pairs(batch: dict[str, Any]) -> int:
    return len(batch["cu_seqlens"]) // 2


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if pad is None else pad  # padding is masked: any id inside the vocabulary will do


def _map_datasets(datasets: Any, function: Callable[[Dataset, str], Any], name: str) -> Any:
    if datasets is None:
        return None
    if isinstance(datasets, dict):
        return {key: function(dataset, key) for key, dataset in datasets.items()}
    return function(datasets, name)
