"""What is logged belongs to the call it was computed in; what is broken stops the run before it is saved."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hdpo_train.run.report import read_metrics
from tests.train.test_trainer import make_trainer, plain_losses
from tests.train.tiny import make_model, make_records


class Broken(Exception):
    pass


def evaluation_loss(tokenizer, records, model=None) -> float:
    """Of an untrained policy at α = 0.7, in plain PyTorch."""
    options = {"alpha": 0.7, "beta": 0.1, "lr": 0.0}
    return plain_losses(tokenizer, records, model or make_model(), steps=1, batch=len(records), **options)[0]


def test_evaluate_knows_nothing_of_a_prediction_or_an_evaluation_broken_off(tokenizer, config, monkeypatch):
    others, records = make_records(9, seed=3), make_records(5, seed=1)
    sets = {"others": Dataset.from_list(others), "own": Dataset.from_list(records)}
    trainer = make_trainer(config(alpha=0.7, per_device_eval_batch_size=2), tokenizer, eval_dataset=sets)
    predicted = trainer.predict(trainer.eval_dataset["others"]).metrics
    assert predicted["test_loss"] == pytest.approx(evaluation_loss(tokenizer, others), rel=1e-4)
    compute_loss, calls = type(trainer).compute_loss, []

    def break_off(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Broken
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(type(trainer), "compute_loss", break_off)
    with pytest.raises(Broken):
        trainer.evaluate(trainer.eval_dataset["others"])
    metrics = trainer.evaluate(trainer.eval_dataset["own"])
    assert metrics["eval_loss"] == pytest.approx(evaluation_loss(tokenizer, records), rel=1e-4)
    trainer.log({"mine": 1.0})
    assert trainer.state.log_history[-1].keys() == {"mine", "epoch", "step"}


def test_train_logs_the_same_whatever_a_callback_computes_in_between(tokenizer, config):
    class Curious(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            trainer.predict(trainer.eval_dataset)
            trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))

        on_step_end = on_substep_end

    lines = []
    for name, callbacks in (("plain", []), ("curious", [Curious()])):
        args = config(alpha=0.7, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=2)
        args.output_dir = str(Path(args.output_dir) / name)
        data = Dataset.from_list(make_records(5, seed=1))
        trainer = make_trainer(args, tokenizer, callbacks=callbacks, eval_dataset=data)
        trainer.train()
        lines.append([line for line in read_metrics(args.output_dir) if "loss" in line])
    assert len(lines[0]) == 2 and lines[0] == lines[1]


def test_train_logs_only_the_tries_that_fit_into_memory(tokenizer, config, monkeypatch):
    args = config(alpha=0.7, auto_find_batch_size=True, max_steps=1, learning_rate=0.0)
    args.train_sampling_strategy, args.gradient_accumulation_steps = "sequential", 2
    trainer = make_trainer(args, tokenizer)
    backward = trainer.accelerator.backward

    def too_much(loss, **kwargs):
        if trainer._train_batch_size == 4 and len(trainer.train_dataset) == 12:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        backward(loss, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "backward", too_much)
    trainer.train()
    (line,) = [line for line in read_metrics(args.output_dir) if "loss" in line]
    pairs = 2 * trainer._train_batch_size
    data = trainer.train_dataset[:pairs]
    counts = {"prompt_ids": 2, "chosen_ids": 1, "rejected_ids": 1}
    tokens = sum(count * len(ids) for column, count in counts.items() for ids in data[column])
    assert trainer._train_batch_size < 4 and line["num_tokens"] == tokens
    assert line["loss"] == pytest.approx(evaluation_loss(tokenizer, make_records()[:pairs]), rel=1e-4)


class NaNGradient(TrainerCallback):
    """A gradient that is NaN in one entry, in one step."""

    def __init__(self, step: int, value: float = float("nan")):
        self.step, self.value = step, value

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            model.get_input_embeddings().weight.grad[17, 3] = self.value


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0, "optim": "sgd"}], ids=["clipped", "sgd"])
@pytest.mark.parametrize(
    ("step", "value", "stops", "saved"),
    [(5, float("nan"), 5, ["checkpoint-2", "checkpoint-4"]), (3, float("inf"), 4, ["checkpoint-2"])],
    ids=["the last step", "before a checkpoint"],
)
def test_train_stops_before_broken_weights_are_saved(step, value, stops, saved, options, tokenizer, config):
    args = config(save_strategy="steps", save_steps=2, max_steps=5, logging_steps=10, **options)
    trainer = make_trainer(args, tokenizer, callbacks=[NaNGradient(step, value)])
    with pytest.raises(FloatingPointError, match=rf"some weights are NaN .* at step {stops} .*learning_rate"):
        trainer.train()
    assert sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*")) == saved


def test_train_stops_where_a_callback_of_the_users_asks_for_a_checkpoint(tokenizer, config):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = True

    args = config(logging_steps=10, max_steps=5)
    trainer = make_trainer(args, tokenizer, callbacks=[NaNGradient(2)])
    trainer.add_callback(Save())  # after the trainer's own, which see to a log line before a checkpoint
    with pytest.raises(FloatingPointError, match="some weights are NaN or infinite at step 2"):
        trainer.train()
    assert [path.name for path in Path(args.output_dir).glob("checkpoint-*")] == ["checkpoint-1"]


def test_train_stops_at_a_nan_loss(tokenizer, config):
    def poison(module, inputs, output):
        return torch.full_like(output, float("nan")) if trainer.state.global_step else None

    model = make_model()
    trainer = make_trainer(config(), tokenizer, model)
    model.model.norm.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match="loss is nan at step 2"):
        trainer.train()


def test_train_names_the_file_of_metrics_that_a_full_disk_refuses(tokenizer, config):
    args = config(max_steps=2)

    class FullDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            path = Path(args.output_dir) / "metrics.jsonl"
            path.unlink()
            path.symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"out/metrics.jsonl could not be written \(No space left on device\); make room"):
        make_trainer(args, tokenizer, callbacks=[FullDisk()]).train()
