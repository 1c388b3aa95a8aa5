"""At α = 1 this trainer is DPO: step for step what TRL's DPOTrainer does."""

import pytest
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM

from hdpo_kernels.pair import LOSS_TYPES
from hdpo_train import HDPOConfig, HDPOTrainer
from hdpo_train.in_trl import linear_logp_in_trl
from tests.train.tiny import FAMILIES, VOCAB, make_model, make_records

STEPS = 20
MIXTRAL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
    num_key_value_heads=1, max_position_embeddings=256, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip


def losses_and_parameters(trainer) -> tuple[list[float], torch.Tensor]:
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def options_of_both(steps: int, **options) -> dict:
    common = dict(
        max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="linear", beta=0.3,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, seed=3,
        max_length=None, gradient_checkpointing=False,
    )  # fmt: skip
    return {**common, **options}


def arguments_of_both(tokenizer, family: str = "llama") -> dict:
    records = Dataset.from_list(make_records(20))
    return dict(model=make_model(family), train_dataset=records, processing_class=tokenizer)


def their_trainer(tokenizer, folder, steps: int, family: str = "llama", **options):
    trl = pytest.importorskip("trl")
    options = {"precompute_ref_log_probs": True, **options}
    args = trl.DPOConfig(output_dir=str(folder / "theirs"), **options_of_both(steps, **options))
    reference = None if options["precompute_ref_log_probs"] else make_model(family)  # else TRL looks for it on the hub
    return trl.DPOTrainer(args=args, ref_model=reference, **arguments_of_both(tokenizer, family))


def both(tokenizer, tmp_path, steps: int, family: str = "llama", **options) -> tuple:
    """This trainer and TRL's, on the same model, pairs and options."""
    theirs = their_trainer(tokenizer, tmp_path, steps, family, **options)
    folders = {"output_dir": str(tmp_path / "ours"), "ref_cache_dir": str(tmp_path / "ref")}
    args = HDPOConfig(**folders, alpha=1.0, **options_of_both(steps, **options))
    return HDPOTrainer(args=args, **arguments_of_both(tokenizer, family)), theirs


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulation"])
def test_the_trajectory_is_that_of_trl(tokenizer, tmp_path, options):
    trainers = both(tokenizer, tmp_path, STEPS, **options)
    (our_losses, our_parameters), (their_losses, their_parameters) = map(losses_and_parameters, trainers)
    assert len(our_losses) == len(their_losses) == STEPS
    for ours, theirs in zip(our_losses, their_losses, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-6)  # measured: 1.5e-7, a few roundings of a loss in fp32
    assert min(our_losses) < 0.5 * our_losses[0]  # something was learnt
    moved = (our_parameters - torch.cat([p.detach().flatten() for p in make_model().parameters()])).abs().max()
    assert (our_parameters - their_parameters).abs().max() < 1e-3 * moved  # measured: 2e-5


LOSSES = {
    **{name: {"loss_type": [name]} for name in LOSS_TYPES if name not in ("sigmoid", "exo_pair", "robust")},
    **{name: {"loss_type": [name], "label_smoothing": 0.1} for name in ("exo_pair", "robust")},
    "a mix": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence", "loss_type": ["hinge"]},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
def test_every_loss_takes_the_steps_of_trl(tokenizer, tmp_path, options):
    trainers = both(tokenizer, tmp_path, 5, **options)
    (our_losses, our_parameters), (their_losses, their_parameters) = map(losses_and_parameters, trainers)
    assert our_losses == pytest.approx(their_losses, rel=1e-5, abs=2e-6)
    moved = (our_parameters - torch.cat([p.detach().flatten() for p in make_model().parameters()])).abs().max()
    # Adam divides by the size of a gradient, so that where one is nearly zero its rounding moves a weight
    off = (our_parameters - their_parameters).abs()
    assert moved > 1e-3 and off.mean() < 1e-4 * moved and off.max() < 0.05 * moved
    ours, theirs = ([line["rewards/chosen"] for line in t.state.log_history if "loss" in line] for t in trainers)
    assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-5)


def test_a_mixture_of_experts_takes_the_steps_of_trl(tokenizer, tmp_path):
    """With its router's loss. Prompts are computed once here, and their tokens count twice."""
    FAMILIES.setdefault("mixtral", lambda: MixtralForCausalLM(MixtralConfig(**MIXTRAL)))
    trainers = both(tokenizer, tmp_path, 5, family="mixtral", router_aux_loss_coef=0.3)
    assert trainers[0].layout.share
    (_, our_parameters), (_, their_parameters) = map(losses_and_parameters, trainers)
    for name in ("loss", "aux_loss"):
        ours, theirs = ([line[name] for line in t.state.log_history if "loss" in line] for t in trainers)
        assert ours == pytest.approx(theirs, rel=1e-5)
    off = (our_parameters - their_parameters).abs()
    assert off.mean() < 1e-4 * trainers[0].args.learning_rate  # measured: 1e-6


METRICS = (
    "mean_token_accuracy", "logits/chosen", "logits/rejected", "entropy", "logps/chosen", "logps/rejected",
    "rewards/margins", "num_tokens",
)  # fmt: skip


def test_metrics_are_those_of_trl(tokenizer, tmp_path):
    logs = []
    for trainer in both(tokenizer, tmp_path, STEPS, loss_type=["sigmoid", "sft"], learning_rate=1e-2):
        trainer.train()
        logs.append([line for line in trainer.state.log_history if "loss" in line])
    for ours, theirs in zip(*logs, strict=True):
        for name in METRICS:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    assert logs[0][0]["mean_token_accuracy"] < 0.1 and logs[0][-1]["mean_token_accuracy"] > 0.2  # it has learnt some


CLOCKS = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"family": "phi", "precompute_ref_log_probs": False, "loss_type": ["ipo", "sft"], "learning_rate": 1e-2},
    ],
    ids=["", "a bias, a reference model, a mix of losses"],
)
def test_trl_takes_the_same_steps_with_linear_logp_inside(tokenizer, tmp_path, options):
    before = their_trainer(tokenizer, tmp_path, 5, **options)
    their_parameters = losses_and_parameters(before)[1]
    with linear_logp_in_trl():
        after = their_trainer(tokenizer, tmp_path, 5, **options)
        our_parameters = losses_and_parameters(after)[1]
    off = (our_parameters - their_parameters).abs()
    step = before.args.learning_rate  # about what Adam's first one moves a weight by
    assert off.max() < 0.02 * step and off.mean() < 1e-4 * step  # measured: 0.008 and 4e-6
    for theirs, ours in zip(before.state.log_history, after.state.log_history, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - CLOCKS:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-6), name


def test_trl_takes_steps_with_the_sampled_gradient_of_linear_logp(tokenizer, tmp_path):
    losses, parameters = losses_and_parameters(their_trainer(tokenizer, tmp_path, 5))
    with linear_logp_in_trl(gradient="sampled", epsilon=2**-5):
        sampled, others = losses_and_parameters(their_trainer(tokenizer, tmp_path, 5))
    assert sampled[0] == pytest.approx(losses[0], abs=2e-6)  # before the first step, the gradient has no part in it
    assert sampled == pytest.approx(losses, rel=0.05) and not torch.equal(parameters, others)
