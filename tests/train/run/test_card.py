"""The model card that a run leaves."""

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from hdpo_train import HDPOTrainer
from hdpo_train.run.card import model_card
from tests.train.test_trainer import make_trainer
from tests.train.tiny import make_model, make_records

START = {"pairs": 12, "alpha": 0.9, "alpha_level": "sequence", "beta": 0.1, "loss_type": "sigmoid"}
LINES = [
    {"step": step, "loss": 0.7 / step, "alpha": alpha, "entropy/chosen": 1 / step}
    for step, alpha in ((1, 0.9), (4, 0.8))
]


def test_card_says_what_was_trained_how_and_what_came_of_it():
    text = model_card("mine", "owner/base", START, LINES, datasets=["owner/pairs", "./pairs.jsonl"], license="mit")
    card = ModelCard(text)
    assert card.data.base_model == "owner/base" and card.data.license == "mit" and "h-dpo" in card.data.tags
    assert card.data.datasets == ["owner/pairs"]  # a file here is none of the hub's
    assert "owner/base, trained on 12 preference pairs of owner/pairs, ./pairs.jsonl with H-DPO" in card.text
    assert "α = 0.9, changed to 0.8 by the end, β = 0.1" in card.text
    assert "| on the training pairs | up to step 1 | up to step 4 |" in card.text
    assert "| entropy on chosen, nats per token | 1 | 0.25 |" in card.text and "hdpo " in card.text


def test_a_run_leaves_a_card_that_it_writes_again_until_somebody_changes_it(config, tokenizer, tmp_path):
    trainer = make_trainer(config(max_steps=2), tokenizer)
    trainer.create_model_card()  # nothing is trained
    path = tmp_path / "out" / "README.md"
    assert not path.exists()
    trainer.train()
    trainer.save_model()
    first = path.read_text()
    assert "up to step 2" in first and "base_model" not in first  # the model has no name
    trainer.create_model_card(dataset="owner/pairs", tags=["math"])
    assert "owner/pairs" in path.read_text() and "- math" in path.read_text()
    path.write_text("Mine.")
    trainer.create_model_card()
    assert path.read_text() == "Mine."


def test_a_trainer_that_only_evaluates_saves_its_model_without_a_card(config, tokenizer, tmp_path):
    records = Dataset.from_list(make_records())
    trainer = HDPOTrainer(make_model(), args=config(), eval_dataset=records, processing_class=tokenizer)
    trainer.evaluate()
    trainer.save_model()
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / "README.md").exists()


def test_a_card_takes_the_place_of_the_placeholder_that_peft_leaves(config, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(config(max_steps=1), tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft" and "preference pairs with H-DPO" in card.text
