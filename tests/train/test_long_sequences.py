"""What transformers offers to save memory, with this trainer: offloaded activations, and optimizers."""

import pytest
import torch
from datasets import Dataset
from transformers import modeling_utils

from hdpo_train import HDPOConfig, HDPOTrainer
from tests.train.tiny import Elsewhere, make_model, make_records


def train(tokenizer, args, model=None) -> HDPOTrainer:
    records = Dataset.from_list(make_records())
    trainer = HDPOTrainer(model=model or make_model(), args=args, train_dataset=records, processing_class=tokenizer)
    trainer.train()
    return trainer


def metrics(trainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    "options",
    [{"packing": False}, {"shared_prompt": True}, {"gradient": "sampled", "epsilon": 0.01}],
    ids=["padded", "shared prompts", "sampled"],
)
def test_offloading_takes_the_same_steps(tokenizer, config, tmp_path, monkeypatch, options):
    monkeypatch.setattr(modeling_utils, "save_on_cpu", elsewhere := Elsewhere())
    options = dict(gradient_checkpointing=True, gradient_accumulation_steps=2, max_steps=2, **options)
    kept = train(tokenizer, config(**options))
    assert elsewhere.nbytes == 0
    args = config(**options, output_dir=str(tmp_path / "offloaded"))
    args.gradient_checkpointing_kwargs = args.activation_checkpointing_kwargs = {"offload": True}
    model, embedded = make_model(), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: embedded.append(out.nbytes * out.requires_grad))
    moved = train(tokenizer, args, model)
    # the layers' inputs and nothing else: no weight, nothing of the head
    assert elsewhere.nbytes == sum(embedded) * len(model.model.layers) > 0
    assert metrics(moved) == metrics(kept)
    for ours, theirs in zip(moved.model.parameters(), kept.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("optim", "learning_rate"), [("adamw_torch", 1e-3), ("adamw_torch_fused", 1e-3), ("adafactor", 1e-2), ("sgd", 1e-2)]
)
def test_optimizers_of_transformers_learn(tokenizer, config, optim, learning_rate):
    logs = metrics(train(tokenizer, config(optim=optim, learning_rate=learning_rate, max_steps=4)))
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_offloading_that_would_do_nothing_is_refused(tmp_path):
    options = dict(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing_kwargs={"offload": True})
    with pytest.raises(ValueError, match="on a CPU they are there"):
        HDPOConfig(gradient_checkpointing=True, **options)
    with pytest.raises(ValueError, match=r"without activation_checkpointing|set gradient_checkpointing too"):
        HDPOConfig(**options)
