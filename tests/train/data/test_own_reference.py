"""Reference log-probs that a data set brings along: used, said, checked, and kept beside their records."""

import pytest
from datasets import Dataset

from hdpo_train import reference
from hdpo_train.data.tokenize import tokenize_pairs
from tests.train.test_trainer import make_trainer
from tests.train.tiny import make_model, make_records

OF_TRL = ("ref_chosen_logps", "ref_rejected_logps")
CHOSEN, REJECTED = [-1.5, -2.5, -3.5, -4.5], [-6.0, -5.0, -4.0, -3.0]


def with_columns(names=("ref_chosen_logp", "ref_rejected_logp"), chosen=CHOSEN, rejected=REJECTED) -> Dataset:
    values = zip(make_records(4), chosen, rejected, strict=True)
    return Dataset.from_list([{**record, names[0]: c, names[1]: r} for record, c, r in values])


@pytest.mark.parametrize(
    "names", [("ref_chosen_logp", "ref_rejected_logp"), ("ref_chosen_logps", "ref_rejected_logps")]
)
def test_train_takes_the_reference_from_columns_and_says_so(names, tokenizer, config, caplog, monkeypatch):
    monkeypatch.setattr(reference, "_compute", lambda *args: pytest.fail("the reference pass ran"))
    args = config(max_steps=1, alpha=0.5, beta=0.2)
    trainer = make_trainer(args, tokenizer, records=with_columns(names).to_list())
    assert "reference log-probs of the train set: taken from its columns" in caplog.text
    assert "no effect" not in caplog.text
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    initial = (0.5 - 1) * 0.2 * (sum(CHOSEN) - sum(REJECTED)) / 4
    assert trainer.start["initial_margin"] == pytest.approx(initial)
    margin = 0.2 * (0.5 * (line["logps/chosen"] - line["logps/rejected"]) - (sum(CHOSEN) - sum(REJECTED)) / 4)
    assert line["rewards/margins"] == pytest.approx(margin, rel=1e-5)


@pytest.mark.parametrize("bad", [None, float("nan"), float("-inf"), 2.0])
def test_tokenize_pairs_counts_values_that_are_no_log_probs_and_keeps_the_others_beside_their_records(bad, tokenizer):
    dataset = with_columns(chosen=[-1.5, bad, -3.5, -4.5])
    with pytest.raises(ValueError, match=r"1 of the 4 records .*\n.*1 x one of ref_chosen_logp .*: record 2"):
        tokenize_pairs(dataset, tokenizer)
    kept = tokenize_pairs(dataset, tokenizer, on_bad_record="drop")
    assert kept["ref_chosen_logp"][:] == [-1.5, -3.5, -4.5] and kept["ref_rejected_logp"][:] == [-6.0, -4.0, -3.0]
    expected = tokenize_pairs(Dataset.from_list(make_records(4)), tokenizer).select([0, 2, 3])
    assert kept["chosen_ids"][:] == expected["chosen_ids"][:]


def test_tokenize_pairs_drops_log_probs_with_records_that_are_bad_for_other_reasons(tokenizer):
    records = with_columns().to_list()
    records[0]["chosen"] = ""
    kept = tokenize_pairs(Dataset.from_list(records), tokenizer, on_bad_record="drop")
    assert kept["ref_chosen_logp"][:] == CHOSEN[1:] and kept["ref_rejected_logp"][:] == REJECTED[1:]
    again = tokenize_pairs(kept, tokenizer)  # ids, and their log-probs
    assert again.to_list() == kept.to_list()


@pytest.mark.parametrize("names", [("ref_chosen_logp", "other"), ("ref_chosen_logp", "ref_rejected_logps")])
def test_tokenize_pairs_refuses_one_column_without_the_other(names, tokenizer):
    with pytest.raises(ValueError, match=r"log-probs in ref_chosen_logp.*: needed are .*or none of them"):
        tokenize_pairs(with_columns(names), tokenizer)


def test_init_refuses_a_ref_model_beside_reference_columns(tokenizer, config):
    with pytest.raises(ValueError, match=r"ref_model is given, and the train set has .*remove_columns\(\['ref_chosen"):
        make_trainer(config(), tokenizer, records=with_columns().to_list(), ref_model=make_model(seed=1))


def test_predict_and_evaluate_refuse_records_that_were_not_given_to_the_constructor(tokenizer, config):
    trainer = make_trainer(config(), tokenizer)
    for call in (trainer.predict, trainer.evaluate):
        with pytest.raises(ValueError, match="give this data set as eval_dataset to HDPOTrainer"):
            call(with_columns())
