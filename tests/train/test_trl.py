"""At α = 1 this trainer is DPO: step for step what TRL's DPOTrainer does."""

import pytest
import torch
from datasets import Dataset

from hdpo_train import HDPOConfig, HDPOTrainer
from tests.train.tiny import make_model, make_records

STEPS = 20


def losses_and_parameters(trainer) -> tuple[list[float], torch.Tensor]:
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulation"])
def test_the_trajectory_is_that_of_trl(tokenizer, tmp_path, options):
    trl = pytest.importorskip("trl")
    common = dict(
        max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="linear", beta=0.3,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, seed=3,
        max_length=None, gradient_checkpointing=False, **options,
    )  # fmt: skip
    records = make_records(20)

    def given():
        return dict(model=make_model(), train_dataset=Dataset.from_list(records), processing_class=tokenizer)

    ours = HDPOTrainer(
        args=HDPOConfig(output_dir=str(tmp_path / "ours"), ref_cache_dir=str(tmp_path / "ref"), alpha=1.0, **common),
        **given(),
    )
    theirs = trl.DPOTrainer(
        args=trl.DPOConfig(output_dir=str(tmp_path / "theirs"), precompute_ref_log_probs=True, **common), **given()
    )
    (our_losses, our_parameters), (their_losses, their_parameters) = map(losses_and_parameters, (ours, theirs))
    assert len(our_losses) == len(their_losses) == STEPS
    for ours, theirs in zip(our_losses, their_losses, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-6)  # measured: 1.5e-7, a few roundings of a loss in fp32
    assert min(our_losses) < 0.5 * our_losses[0]  # something was learnt
    moved = (our_parameters - torch.cat([p.detach().flatten() for p in make_model().parameters()])).abs().max()
    assert (our_parameters - their_parameters).abs().max() < 1e-3 * moved  # measured: 2e-5
