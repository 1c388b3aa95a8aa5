"""Options and arguments of transformers: used, refused, or named in one warning. None is ignored silently."""

import dataclasses
import inspect

import pytest
import torch
import transformers
from packaging import version
from transformers import Trainer, TrainingArguments

from hdpo_train import HDPOConfig, HDPOTrainer, inherited
from hdpo_train.of_trl import INSTEAD
from tests.train.commands import refused
from tests.train.test_trainer import make_trainer

USED = (
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "max_steps",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16", "tf32", "activation_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config",
    "torch_empty_cache_steps", "auto_find_batch_size", "logging_strategy", "logging_steps",
    "logging_first_step", "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm",
    "include_num_input_tokens_seen", "report_to", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    "do_eval", "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit",
    "enable_jit_checkpoint", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
    "hub_revision", "ignore_data_skip", "restore_callback_states_from_checkpoint", "resume_from_checkpoint",
    "full_determinism", "seed", "data_seed", "use_cpu", "accelerator_config", "train_sampling_strategy",
    "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph",
    "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "debug", "skip_memory_metrics",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "parallelism_config",
)  # fmt: skip
HARMLESS = {  # whatever they say, it is so, or changes nothing that anyone could have meant
    "prediction_loss_only": "evaluation returns no predictions",
    "use_cache": "written into the saved config only, as Trainer does",
    "do_train": "for scripts: hdpo-train trains",
    "local_rank": "deprecated: launchers set the environment",
    "run_name": "a label for trackers",
    "project": "a label for trackio",
}


def test_every_option_of_training_arguments_was_looked_at():
    """A new one belongs into a table of `inherited`, or, tried on a model, into one of the lists here."""
    lists = [USED, HARMLESS, inherited.REFUSED, inherited.NO_EFFECT]
    assert {field.name for field in dataclasses.fields(TrainingArguments)} - set().union(*lists) == set()
    assert sum(map(len, lists)) == len(set().union(*lists))  # each in one of them


def test_every_argument_of_trainer_was_looked_at():
    own = set(inspect.signature(HDPOTrainer).parameters) - {"trainer_kwargs"}
    known = {*own, *inherited.NOT_TAKEN, "optimizer_cls_and_kwargs"}
    assert set(inspect.signature(Trainer).parameters) - known == set()


@pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.23"), reason="lacks the newest options")
def test_tables_name_options_that_exist():
    names = {field.name for field in dataclasses.fields(HDPOConfig)}
    ranges = {name for _, names in inherited.RANGES.values() for name in names}
    needed = {other for other, _ in inherited.NEEDS.values()}
    assert ranges | needed | set(inherited.NEEDS) | set(inherited.REFUSED) | set(inherited.NO_EFFECT) <= names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha=5\.0 is not possible here: noise"),
        ({"include_for_metrics": ["inputs"]}, r"include_for_metrics=\['inputs'\] is not possible here: no logits"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True .* one precision"),
        ({"train_sampling_strategy": "group_by_length"}, "only random or sequential: .*max_tokens_per_batch N"),
        ({"train_sampling_strategy": "shuffled"}, "train_sampling_strategy='shuffled' is not possible here"),
        ({"include_num_input_tokens_seen": "non_padding"}, "num_tokens of every log line"),
        ({"max_steps": 0}, "max_steps=0 .* it would mean num_train_epochs"),
        ({"eval_steps": 100}, "eval_steps=100 has no effect without eval_strategy=steps"),
        ({"do_eval": True}, "do_eval=True has no effect without eval_strategy"),
        ({"dataloader_persistent_workers": True}, "no effect without dataloader_num_workers"),
        ({"epsilon": 0.01}, "epsilon=0.01 has no effect without gradient=sampled"),
        ({"alpha_max": 3.0}, "alpha_max=3.0 has no effect without target_entropy"),
        ({"trackio_space_id": "me"}, "no effect without report_to=trackio"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True .* packed pairs"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True shares per_device_train_batch_size"),
        ({"report_to": "carrier_pigeon"}, "report_to='carrier_pigeon' is not known: it can be azure_ml, "),
        ({"log_level": "loud"}, "log_level='loud' is not known: .*warning"),
        ({"fp16": True}, "fp16 needs a GPU"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min": 1}},
            r"lr_scheduler_kwargs=\{'min': 1\} .*cosine",
        ),
        ({"lr_scheduler_kwargs": {"min_lr": 1}}, "has no effect on lr_scheduler_type=constant"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr: One of min_lr"),
        ({"warmup_steps": 0.1}, "warmup_steps=0.1 has no effect on lr_scheduler_type=constant.*constant_with_warmup"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_config_refuses_what_would_do_nothing_or_something_else(options, message, config):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("gradient_accumulation_steps", 0, "a positive whole number, got 0"),
        ("per_device_eval_batch_size", 2.5, "a positive whole number, got 2.5"),
        ("max_length", "None", "a positive whole number or None, got 'None'"),
        ("save_steps", 0, "positive, got 0"),
        ("learning_rate", float("nan"), "finite and not negative, got nan"),
        ("max_grad_norm", None, "finite and not negative, got None"),
        ("adam_beta2", 1.0, "at least 0 and less than 1, got 1.0"),
        ("seed", -1, "a whole number from 0 to 4294967295, got -1"),
        ("alpha", 1e308, "from 1e-9 to 1e9 .* got 1e+308"),
        ("beta", 1e-300, "from 1e-9 to 1e9 .* got 1e-300"),
        ("alpha", [1, 2], "from 1e-9 to 1e9 .* got [1, 2]"),
        ("alpha", True, "from 1e-9 to 1e9 .* got True"),
    ],
)
def test_config_refuses_numbers_out_of_range(name, value, words, config):
    words = words.replace("+", r"\+").replace("[", r"\[")
    with pytest.raises(ValueError, match=f"^{name} must be {words}"):
        config(**{name: value})


def test_config_refuses_a_tracker_that_is_not_installed(config, monkeypatch):
    monkeypatch.setattr(inherited, "get_available_reporting_integrations", lambda: ["mlflow"])
    with pytest.raises(ValueError, match=r"report_to='wandb' needs a package that is not installed.*mlflow or none"):
        config(report_to=["mlflow", "wandb"])
    config(report_to="mlflow")


def test_config_takes_numbers_at_the_ends_of_their_ranges(config):
    args = config(
        alpha=1e-9, beta=1e9, learning_rate=0, max_grad_norm=0, save_total_limit=None, max_steps=1, seed=2**32 - 1
    )
    assert (args.alpha, args.beta) == (1e-9, 1e9)


def test_config_names_options_without_effect_in_one_warning(config, caplog):
    config(eval_accumulation_steps=4, remove_unused_columns=False)
    (warning,) = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert "eval_accumulation_steps (evaluation keeps sums" in warning and "remove_unused_columns (" in warning
    caplog.clear()
    config(prediction_loss_only=True)
    assert "no effect" not in caplog.text


@pytest.mark.parametrize("name", inherited.NOT_TAKEN)
def test_init_refuses_hooks_that_it_could_not_call(name, tokenizer, config):
    with pytest.raises(ValueError, match=f"^{name} has no place here: "):
        make_trainer(config(), tokenizer, records=[{"not": "looked at"}], **{name: lambda *_: None})


def test_init_refuses_arguments_that_it_does_not_have(tokenizer, config):
    with pytest.raises(TypeError, match="no argument 'beta'; options of a run belong into HDPOConfig"):
        make_trainer(config(), tokenizer, records=[{"not": "looked at"}], beta=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "adamw_torch", "optim_args": "foo=1"}, "optim_args='foo=1' has no effect on optim=adamw_torch"),
        (
            {"optim_target_modules": "all-linear"},
            "optim_target_modules='all-linear' has no effect on optim=adamw",
        ),
        ({"optim": "lomo"}, "optim=lomo cannot be used: You need to install `lomo_optim`"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model='accuracy' is none of .*rewards/accuracies"),
    ],
)
def test_init_refuses_optimizers_and_metrics_before_any_long_work(options, message, tokenizer, config):
    with pytest.raises(ValueError, match=message):
        make_trainer(config(**options), tokenizer, records=[{"not": "looked at"}])


def test_init_takes_optimizers_by_name_class_and_argument(tokenizer, config):
    make_trainer(config(optim="sgd", optim_args="momentum=0.9"), tokenizer)
    trainer = make_trainer(
        config(), tokenizer, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1, "momentum": 0.5})
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD) and trainer.optimizer.defaults["momentum"] == 0.5
    make_trainer(config(metric_for_best_model="eval_rewards/margins"), tokenizer)


def test_init_refuses_model_init_kwargs_for_a_model_that_is_there(tokenizer, config):
    with pytest.raises(ValueError, match=r"model_init_kwargs=\{'dtype': 'bfloat16'\} come too late"):
        make_trainer(config(model_init_kwargs={"dtype": "bfloat16"}), tokenizer)


def test_train_resumes_where_the_config_says_so(tokenizer, config):
    make_trainer(config(save_strategy="steps", save_steps=2), tokenizer).train()
    trainer = make_trainer(config(max_steps=5, resume_from_checkpoint="true"), tokenizer)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_batch": 120}], ids=["pairs", "tokens"])
def test_train_loader_takes_every_option_of_its_workers(options, tokenizer, config):
    workers = {"multiprocessing_context": "spawn", "in_order": False, "prefetch_factor": 3, "num_workers": 1}
    args = config(**options, **{f"dataloader_{name}": value for name, value in workers.items()})
    loader = make_trainer(args, tokenizer).get_train_dataloader()
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    assert (loader.in_order, loader.prefetch_factor, loader.num_workers) == (False, 3, 1)


def test_every_option_of_trl_is_here_or_named():
    """A new version of TRL that adds one fails here."""
    trl = pytest.importorskip("trl")
    names, inherited, here = (
        {f.name for f in dataclasses.fields(kind)} for kind in (trl.DPOConfig, TrainingArguments, HDPOConfig)
    )
    assert names - inherited - here == INSTEAD.keys()


def test_options_of_trl_are_taken_where_they_ask_for_nothing_and_refused_with_the_way_out(config, caplog, capsys):
    config(precompute_ref_log_probs=True, padding_free=True, truncation_mode="keep_start", ld_alpha=None)
    assert not caplog.records
    with pytest.raises(ValueError, match="use_weighting=True of TRL's DPOConfig has no place here: it needs another"):
        config(use_weighting=True)
    with pytest.raises(ValueError, match=r"sync_ref_model=True .* start another run from this run's model"):
        config(sync_ref_model=True)
    assert "--activation-offloading, an option of TRL's: set gradient_checkpointing" in refused(
        ["--activation-offloading", "True"], capsys
    )
