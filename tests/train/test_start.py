"""What a run is refused for before it begins: noise, a stale reference, sequences that are too long."""

import logging

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from hdpo_kernels.pair import PairOptions
from hdpo_train import HDPOTrainer, reference, start
from hdpo_train.run.report import read_metrics
from tests.train.tiny import _IDS, _SIZE, VOCAB, make_model, make_records


def trainer_of(model, args, tokenizer, records=None, **options):
    data = Dataset.from_list(records or make_records())
    return HDPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, **options)


class Jumpy(nn.Module):
    """Noise of a kind that no option names."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        output = self.inner(hidden)
        return output * (1 + torch.rand(()) * self.training)


def jumpy_model():
    model = make_model()
    model.model.layers[1].mlp.down_proj = Jumpy(model.model.layers[1].mlp.down_proj)
    return model


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_init_refuses_a_model_that_is_random_in_training(precision, tokenizer, config, monkeypatch):
    monkeypatch.setattr(reference, "_compute", lambda *_: pytest.fail("computed a reference"))
    message = r"up to .* nats.*Modules that do it: Jumpy \(model\.layers\.1\.mlp\.down_proj\)\..*disable_dropout=False"
    with pytest.raises(ValueError, match=message):
        trainer_of(jumpy_model(), config(**precision), tokenizer)


def test_init_changes_no_mode_and_no_random_state(tokenizer, config):
    model = make_model("gpt2").train()
    torch.manual_seed(0)  # as Trainer does it
    expected = torch.rand(3)
    trainer_of(model, config(), tokenizer)
    assert torch.equal(torch.rand(3), expected) and all(module.training for module in model.modules())


def test_init_takes_noise_that_was_asked_for_or_does_not_matter(tokenizer, config):
    assert len(trainer_of(jumpy_model(), config(disable_dropout=False), tokenizer).train_dataset) == 12
    data = Dataset.from_list(make_records())
    trainer = HDPOTrainer(jumpy_model(), args=config(), eval_dataset=data, processing_class=tokenizer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.693147, abs=1e-6)


def test_train_takes_models_that_are_their_own_base_model(tokenizer, config):
    """Llama 4's text model: base_model_prefix names a part that it does not have."""
    sizes = dict(**_SIZE, **_IDS, num_key_value_heads=1, head_dim=16, intermediate_size_mlp=48, num_local_experts=2)
    model = AutoModelForCausalLM.from_config(Llama4TextConfig(**sizes))
    assert model.base_model is model
    args = config(max_steps=1, learning_rate=0.0)
    trainer_of(model, args, tokenizer).train()
    (line,) = [line for line in read_metrics(args.output_dir) if "loss" in line]
    assert line["loss"] == pytest.approx(0.693147, abs=1e-6) and abs(line["rewards/chosen"]) < 1e-5


def test_init_refuses_reference_log_probs_that_are_not_the_references(tokenizer, config, monkeypatch):
    trainer_of(make_model(), config(), tokenizer)
    read = reference._read
    monkeypatch.setattr(reference, "_read", lambda *args: read(*args) - 0.01)
    with pytest.raises(ValueError, match=r"log-probs of pair \d+ of the train set are .*delete the cache"):
        trainer_of(make_model(), config(), tokenizer)


def llama(most, **rope):
    rope = {"rope_type": "default", "rope_theta": 1e4, **rope}
    return LlamaForCausalLM(LlamaConfig(**_SIZE, **_IDS, max_position_embeddings=most, rope_parameters=rope))


def gpt2(most):
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=most))


def ids(*lengths):
    """Records that are tokenized already: prompt, chosen, rejected of so many tokens."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return {name: [start + i for i in range(n)] for start, (name, n) in enumerate(zip(names, lengths, strict=True), 2)}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_init_refuses_a_record_longer_than_the_models_positions(make, tokenizer, config):
    records = [ids(20, 12, 11), ids(20, 5, 13), ids(40, 4, 2)]
    message = r"record 2 of the train set has a sequence of 33 tokens, and 1 more .*has 32 positions.*max_length=32"
    with pytest.raises(ValueError, match=message):
        trainer_of(make(32), config(), tokenizer, records)
    trainer_of(make(32), config(max_length=32), tokenizer, records[:2])


def test_init_warns_of_positions_that_depend_on_the_batch(tokenizer, config, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    records = [ids(20, 12, 11), ids(3, 5, 4)]
    trainer_of(llama(16, rope_type="dynamic", factor=4.0), config(), tokenizer, records)
    assert "sequences of up to 32 tokens. Beyond 16 tokens" in caplog.text and "max_length=16" in caplog.text
    caplog.clear()
    trainer_of(llama(32, rope_type="dynamic", factor=4.0), config(), tokenizer, records)
    assert "Beyond" not in caplog.text


def pairs_of_known_margin(chosen, rejected, count=3, per_token=-2.0):
    """Tokenized pairs of so many tokens each, all equally likely to the reference."""
    columns = {"ref_chosen_logp": per_token * chosen, "ref_rejected_logp": per_token * rejected}
    return Dataset.from_list([{**ids(4, chosen, rejected), **columns}] * count)


@pytest.mark.parametrize(
    ("alpha", "mean", "words"),
    [(0.5, -2.0, "pushes hard to make up for it"), (1.5, 2.0, "takes pairs for won, and hardly pushes")],
)
def test_a_large_margin_before_training_is_one_warning_that_says_what_to_do(alpha, mean, words):
    data = pairs_of_known_margin(10, 20)
    margins, (warning,) = start.margins_before_training(data, PairOptions(alpha, 0.2))
    assert margins.tolist() == pytest.approx([mean] * 3)  # (α − 1) β (ρ_w − ρ_l) = ±0.5 · 0.2 · 20
    expected = (f"{mean:+.2f} on average", "10.0 and 20.0 tokens", f"alpha = {alpha}", words, "alpha_level=token")
    assert all(part in warning for part in expected)
    margins, warnings = start.margins_before_training(data, PairOptions(alpha, 0.2, alpha_level="token"))
    assert margins.abs().max() < 1e-6 and warnings == []


@pytest.mark.parametrize(
    ("options", "warned"),
    [({"alpha": 0.5, "beta": 0.099}, 0), ({"alpha": 0.5, "beta": 0.101}, 1), ({"alpha": 1.0, "beta": 5.0}, 0),
     ({"alpha": 0.5, "beta": 0.2, "loss_type": "ipo"}, 0), ({"alpha": 0.5, "beta": 0.2, "loss_type": "hinge"}, 1)],
)  # fmt: skip
def test_a_margin_before_training_is_warned_of_beyond_one_alone(options, warned):
    assert len(start.margins_before_training(pairs_of_known_margin(10, 20), PairOptions(**options))[1]) == warned


def test_margins_by_token_that_lengths_do_not_make_are_warned_of_without_that_way_out():
    data = Dataset.from_list([{**ids(4, 10, 10), "ref_chosen_logp": -40.0, "ref_rejected_logp": -10.0}])
    _, (warning,) = start.margins_before_training(data, PairOptions(0.5, 0.2))
    assert "is +3.00 on average" in warning and "alpha_level" not in warning


def test_pairs_so_unequal_that_alpha_by_token_is_negative_are_counted():
    data = concatenate_datasets([pairs_of_known_margin(1, 9, count=2), pairs_of_known_margin(4, 9)])
    _, (warning,) = start.margins_before_training(data, PairOptions(0.7, 0.1, alpha_level="token"))
    assert "in 2 of 5 pairs one response is so much shorter" in warning  # 1 < 0.3 · 5
    assert start.margins_before_training(data, PairOptions(0.9, 0.1, alpha_level="token"))[1] == []


def test_train_warns_of_a_large_margin_once(tokenizer, config, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    trainer = trainer_of(make_model(), config(alpha=0.5, beta=0.2), tokenizer, pairs_of_known_margin(10, 20).to_list())
    assert caplog.text.count("margin before training is -2.00") == 1
    assert trainer.start["initial_margin"] == pytest.approx(-2.0) and trainer.start["alpha_level"] == "sequence"
