"""HDPOTrainer: the trajectory of plain PyTorch, resuming, adapters, and what it refuses."""

import json
import logging
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from hdpo_kernels import naive
from hdpo_train import HDPOConfig, HDPOTrainer
from hdpo_train.data.tokenize import tokenize_pairs
from hdpo_train.run.report import METRICS_FILE, REPORT_FILE, read_metrics
from hdpo_train.run.whole import checkpoint_problem
from tests.train.tiny import VOCAB, make_model, make_records

SAMPLED = {"gradient": "sampled", "epsilon": 2**-7}


def make_trainer(args, tokenizer, model=None, records=None, **kwargs) -> HDPOTrainer:
    dataset = Dataset.from_list(make_records() if records is None else records)
    return HDPOTrainer(model or make_model(), args=args, train_dataset=dataset, processing_class=tokenizer, **kwargs)


def losses(output_dir) -> list[float]:
    return [line["loss"] for line in read_metrics(output_dir) if "loss" in line]


def plain_losses(tokenizer, records, model, *, steps, batch, lr, alphas=None, **loss) -> list[float]:
    """The same training in twenty lines of PyTorch: sequential batches, sequences one by one, full logits.

    alphas: one for each step.
    """
    data = tokenize_pairs(Dataset.from_list(records), tokenizer)
    sequences = [[(e["prompt_ids"], e[side]) for side in ("chosen_ids", "rejected_ids")] for e in data]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def logits_of(prompt, completion):
        ids = torch.tensor([prompt + completion])
        return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]

    def batch_loss(pairs, ref, **loss):
        parts = [logits_of(*sequence) for pair in pairs for sequence in pair]
        labels = torch.tensor([token for pair in pairs for _, completion in pair for token in completion])
        cu_seqlens = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        return naive.hdpo_loss(torch.cat(parts), labels, cu_seqlens, ref, **loss)

    batches = [sequences[i : i + batch] for i in range(0, steps * batch, batch)]
    with torch.no_grad():
        refs = [batch_loss(pairs, None, **loss).logps for pairs in batches]
    results = []
    for step, (pairs, ref) in enumerate(zip(batches, refs, strict=True)):
        result = batch_loss(pairs, ref, **loss, **({"alpha": alphas[step]} if alphas else {}))
        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        results.append(result.loss.item())
    return results


@pytest.mark.parametrize(
    "loss",
    [
        {"alpha": 1.0, "beta": 0.5},
        {"alpha": 0.8, "beta": 0.3, "label_smoothing": 0.1},
        {"alpha": 1.2, "beta": 0.5, "loss_type": "ipo", "nll_weight": 0.2},
        {"alpha": 0.9, "beta": 0.2, "loss_type": "hinge"},
        {"alpha": 0.7, "beta": 0.5, "alpha_level": "token", "nll_weight": 0.1},
    ],
    ids=lambda loss: f"{loss.get('loss_type', 'sigmoid')}-{loss['alpha']}-{loss.get('alpha_level', '')}",
)
def test_train_follows_plain_pytorch(loss, tokenizer, config):
    args = config(train_sampling_strategy="sequential", max_steps=3, **loss)
    make_trainer(args, tokenizer).train()
    expected = plain_losses(tokenizer, make_records(), make_model(), steps=3, batch=4, lr=1e-3, **loss)
    assert losses(args.output_dir) == pytest.approx(expected, rel=2e-4, abs=2e-5)


def test_train_starts_at_log_two_and_zero_rewards_for_alpha_one(tokenizer, config):
    args = config(max_steps=1, alpha=1.0)
    make_trainer(args, tokenizer).train()
    line = read_metrics(args.output_dir)[1]
    assert line["loss"] == pytest.approx(0.693147, abs=1e-5)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/initial_margins"):
        assert abs(line[key]) < 1e-5, key


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_train_starts_at_the_initial_margin_for_other_alphas(level, tokenizer, config):
    args = config(max_steps=1, alpha=0.7, per_device_train_batch_size=12, alpha_level=level)
    make_trainer(args, tokenizer).train()
    start, line = read_metrics(args.output_dir)[:2]
    assert abs(start["initial_margin"]) > (0.05 if level == "sequence" else 1e-4)
    assert line["rewards/margins"] == pytest.approx(start["initial_margin"], rel=1e-4, abs=1e-6)
    assert line["rewards/initial_margins"] == pytest.approx(start["initial_margin"], rel=1e-5)


def test_train_logs_trl_names_and_leaves_metrics_and_plots(tokenizer, config):
    args = config(eval_strategy="steps", eval_steps=2)
    trainer = make_trainer(args, tokenizer, eval_dataset=Dataset.from_list(make_records(5, seed=1)))
    trainer.train()
    lines = read_metrics(args.output_dir)
    names = {
        "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected", "entropy", "entropy/chosen", "entropy/rejected", "rewards/initial_margins",
        "mean_token_accuracy", "logits/chosen", "logits/rejected",
    }  # fmt: skip
    assert names | {"num_tokens"} <= set(lines[1])
    evaluation = next(line for line in lines if "eval_loss" in line)
    assert {f"eval_{name}" for name in names} <= set(evaluation)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert (Path(args.output_dir) / REPORT_FILE).stat().st_size > 10_000
    # the token mean lies between its two sides, and nothing exceeds the uniform distribution's entropy
    line = lines[1]
    low, high = sorted((line["entropy/chosen"], line["entropy/rejected"]))
    assert 0 < low <= line["entropy"] <= high < torch.tensor(300.0).log()


def test_train_logs_no_mean_logits_under_a_softcap(tokenizer, config):
    args = config(max_steps=1)
    make_trainer(args, tokenizer, model=make_model("gemma2")).train()
    line = read_metrics(args.output_dir)[1]
    assert line["mean_token_accuracy"] >= 0 and not [name for name in line if name.startswith("logits/")]


def test_evaluate_weights_pairs_equally_whatever_the_batch_size(tokenizer, config):
    data = Dataset.from_list(make_records(7, seed=3))
    results = []
    for size in (2, 7):
        args = config(per_device_eval_batch_size=size, alpha=0.8)
        results.append(HDPOTrainer(make_model(), args=args, eval_dataset=data, processing_class=tokenizer).evaluate())
    for key in ("eval_loss", "eval_rewards/margins", "eval_entropy", "eval_rewards/accuracies"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-5), key


def test_evaluate_takes_another_prefix_and_named_sets(tokenizer, config):
    data = {name: Dataset.from_list(make_records(3, seed=i)) for i, name in enumerate(("one", "two"))}
    trainer = HDPOTrainer(make_model(), args=config(), eval_dataset=data, processing_class=tokenizer)
    result = trainer.evaluate(metric_key_prefix="test")
    assert {"test_one_rewards/margins", "test_two_rewards/margins", "test_two_loss"} <= set(result)
    assert result["test_one_logps/chosen"] != result["test_two_logps/chosen"]


def test_train_takes_remove_unused_columns(tokenizer, config):
    make_trainer(config(max_steps=1, remove_unused_columns=True), tokenizer).train()


def test_train_refuses_a_folder_that_holds_a_model(tokenizer, config):
    make_model().save_pretrained(config().output_dir)
    with pytest.raises(FileExistsError, match=r"model\.safetensors"):
        make_trainer(config(), tokenizer).train()


def test_evaluate_refuses_data_without_reference(tokenizer, config):
    trainer = make_trainer(config(), tokenizer)
    with pytest.raises(ValueError, match="give this data set as eval_dataset"):
        trainer.evaluate(Dataset.from_list(make_records()))


def test_train_gradient_accumulation_equals_one_large_batch(tokenizer, config):
    """To fp32 rounding: sums over 8 pairs in another order, six times the largest difference that was measured.

    Relative 1e-6 in metrics (margins, which are differences), 1.6e-6 in the norm of the way that parameters went.
    """
    before = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    runs = []
    for size, steps in ((8, 1), (1, 8)):
        model = make_model()
        args = config(
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=4, alpha=0.9,
            train_sampling_strategy="sequential", output_dir=str(Path(config().output_dir) / str(size)),
        )  # fmt: skip
        make_trainer(args, tokenizer, model, make_records(32)).train()
        lines = [line for line in read_metrics(args.output_dir) if "loss" in line]
        runs.append((lines, torch.cat([p.detach().flatten() for p in model.parameters()]) - before))
    for one, eight in zip(runs[0][0], runs[1][0], strict=True):
        assert one == pytest.approx(eight, rel=6e-6)
    assert len(runs[0][0]) == 4
    assert (runs[0][1] - runs[1][1]).norm() < 1e-5 * runs[0][1].norm()


@pytest.mark.parametrize("gradient", [{}, SAMPLED], ids=["exact", "sampled"])
@pytest.mark.parametrize(
    "option", [{"torch_compile": True, "torch_compile_backend": "eager"}, {"gradient_checkpointing": True}], ids=str
)
def test_train_takes_the_same_steps_compiled_or_checkpointed(option, gradient, tokenizer, config):
    runs = []
    for name, options in (("plain", gradient), ("changed", {**gradient, **option})):
        args = config(max_steps=3, alpha=0.9, output_dir=str(Path(config().output_dir) / name), **options)
        make_trainer(args, tokenizer).train()
        runs.append(losses(args.output_dir))
    assert len(runs[0]) == 3 and runs[0] == pytest.approx(runs[1], rel=1e-5)


@pytest.mark.parametrize("gradient", [{}, SAMPLED], ids=["exact", "sampled"])
def test_train_resumes_with_the_metrics_of_an_uninterrupted_run(gradient, tokenizer, config):
    whole = config(max_steps=10, save_strategy="steps", save_steps=5, **gradient)  # epochs of 8 steps
    make_trainer(whole, tokenizer, records=make_records(30)).train()
    expected = [line for line in read_metrics(whole.output_dir) if "loss" in line]

    resumed = make_trainer(whole, tokenizer, records=make_records(30))
    resumed.train(resume_from_checkpoint=str(Path(whole.output_dir) / "checkpoint-5"))
    found = [line for line in read_metrics(whole.output_dir) if "loss" in line]
    assert found == expected


def sgd_steps(tokenizer, args, lora=False) -> tuple[list[dict], torch.Tensor]:
    """Metrics of every step, and how far the parameters went: with plain SGD, as far as the gradient says."""
    peft = pytest.importorskip("peft") if lora else None
    peft_config = peft and peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(args, tokenizer, make_model("phi"), make_records(16), peft_config=peft_config)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    after = zip(trainer.model.parameters(), before, strict=True)
    metrics = [line for line in read_metrics(args.output_dir) if "loss" in line]
    return metrics, torch.cat([(p.detach() - start).flatten() for p, start in after])


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"lora": True}],
    ids=["plain", "accumulation", "checkpointing", "lora"],
)
def test_train_sampled_follows_exact(options, tokenizer, config):
    """The first step has the same metrics and nearly the same gradient; a seed repeats every bit of a run."""
    options = {"alpha": 0.9, "optim": "sgd", "max_steps": 1, **options}
    lora = options.pop("lora", False)

    def run(name, **more):
        args = config(**options | more, output_dir=str(Path(config().output_dir) / name))
        return sgd_steps(tokenizer, args, lora)

    (exact,), exact_way = run("exact")
    (first,), way = run("sampled", **SAMPLED)
    assert {**first, "grad_norm": 0} == pytest.approx({**exact, "grad_norm": 0}, rel=1e-5, abs=1e-6)
    assert 0 < (way - exact_way).norm() < 0.1 * exact_way.norm()
    runs = [run(f"again-{i}", max_steps=3, **SAMPLED) for i in range(2)]
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert len(runs[0][0]) == 3 and runs[0][0][0] == first


def test_train_sampled_takes_the_same_data_whatever_it_draws(tokenizer, config):
    runs = []
    for name, options in (("exact", {}), ("sampled", SAMPLED), ("redrawn", {**SAMPLED, "seed": 1, "data_seed": 0})):
        args = config(max_steps=6, alpha=0.9, output_dir=str(Path(config().output_dir) / name), **options)
        make_trainer(args, tokenizer).train()  # two epochs
        runs.append([line for line in read_metrics(args.output_dir) if "loss" in line])
    for key, same in (("rewards/initial_margins", True), ("loss", False)):
        exact, sampled, redrawn = ([line[key] for line in run] for run in runs)
        assert (exact == sampled) == (sampled == redrawn) == same


def test_evaluate_and_reference_draw_nothing(tokenizer, config):
    data = Dataset.from_list(make_records(5, seed=1))
    found, states = [], []
    for name, options in (("exact", {}), ("sampled", SAMPLED), ("sampled", SAMPLED)):  # the last from the cache
        args = config(ref_cache_dir=str(Path(config().output_dir) / name), **options)
        trainer = make_trainer(args, tokenizer, eval_dataset=data)
        found.append((trainer.train_dataset["ref_chosen_logp"][:], trainer.evaluate()["eval_loss"]))
        states.append(torch.get_rng_state())
    assert found[0][0] == found[1][0] and found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])


def test_init_refuses_more_entries_than_the_vocabulary_before_the_reference_pass(tokenizer, config, monkeypatch):
    from hdpo_train import reference

    monkeypatch.setattr(reference, "_compute", lambda *args: pytest.fail("the reference pass ran"))
    with pytest.raises(ValueError, match=rf"1026 entries of a row that has {VOCAB}.*epsilon >= 0\.00336"):
        make_trainer(config(gradient="sampled"), tokenizer)


def test_train_refuses_a_folder_that_holds_another_run(tokenizer, config):
    make_trainer(config(), tokenizer).train()
    before = (Path(config().output_dir) / METRICS_FILE).read_text()
    with pytest.raises(FileExistsError, match=r"holds another run.*--resume_from_checkpoint.*--overwrite_output_dir"):
        make_trainer(config(), tokenizer).train()
    assert (Path(config().output_dir) / METRICS_FILE).read_text() == before
    make_trainer(config(overwrite_output_dir=True), tokenizer).train()


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "optimizer.pt"])
def test_train_refuses_a_corrupt_checkpoint_and_names_a_whole_one(name, tokenizer, config, caplog):
    args = config(save_strategy="steps", save_steps=2)
    make_trainer(args, tokenizer).train()
    broken = Path(args.output_dir) / "checkpoint-4" / name
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"checkpoint-4: {name} .*whole checkpoints there: .*checkpoint-2"):
        make_trainer(args, tokenizer).train(resume_from_checkpoint=str(broken.parent))
    with caplog.at_level("WARNING"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        make_trainer(args, tokenizer).train(resume_from_checkpoint=True)  # takes that one itself, and says so
    assert re.search(rf"checkpoint-4: {name} .*Going on from .*checkpoint-2", caplog.text)
    assert checkpoint_problem(broken.parent) is None
    for folder in Path(args.output_dir).glob("checkpoint-*"):
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: .*checkpoint-4: .*checkpoint-2: "):
        make_trainer(args, tokenizer).train(resume_from_checkpoint=True)


def test_train_resumes_from_nothing_by_starting_but_not_over_a_finished_run(tokenizer, config):
    make_trainer(config(), tokenizer).train(resume_from_checkpoint=True)
    assert len(losses(config().output_dir)) == 4
    with pytest.raises(FileExistsError, match="holds another run"):
        make_trainer(config(), tokenizer).train(resume_from_checkpoint=True)


def test_train_stops_at_an_optimizer_that_breaks_the_weights(tokenizer, config):
    class Poison(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(float("nan"))

    model = make_model()
    optimizer = Poison(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(FloatingPointError, match="some weights are NaN or infinite at step 1"):
        make_trainer(config(), tokenizer, model, optimizers=(optimizer, scheduler)).train()


def test_save_model_loads_with_auto_classes(tokenizer, config, tmp_path):
    model = make_model("llama-tied")
    trainer = make_trainer(config(), tokenizer, model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(10).unsqueeze(0)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<eos>"


def test_train_moves_tied_embeddings_by_head_and_input_gradients(tokenizer, config):
    args = config(train_sampling_strategy="sequential", max_steps=3, beta=0.5)
    make_trainer(args, tokenizer, make_model("llama-tied")).train()
    expected = plain_losses(
        tokenizer, make_records(), make_model("llama-tied"), steps=3, batch=4, lr=1e-3, alpha=1.0, beta=0.5
    )
    assert losses(args.output_dir) == pytest.approx(expected, rel=2e-4, abs=2e-5)


def test_init_takes_reference_from_ref_model(tokenizer, config):
    reference = make_model(seed=1)
    trainer = make_trainer(config(), tokenizer, ref_model=reference)
    alone = make_trainer(config(), tokenizer, model=make_model(seed=1))
    for column in ("ref_chosen_logp", "ref_rejected_logp"):
        assert trainer.train_dataset[column][:] == pytest.approx(alone.train_dataset[column][:], rel=1e-5)


def test_compute_loss_takes_its_own_alpha_where_trainers_share_a_model(tokenizer, config):
    model, losses = make_model(), []
    trainers = [make_trainer(config(alpha=alpha), tokenizer, model) for alpha in (1.0, 0.5)]
    for trainer in trainers:
        batch = trainer.data_collator(list(trainer.train_dataset.select(range(4))))
        losses.append(trainer.compute_loss(model, batch).item())
    chosen, rejected = (
        torch.tensor(trainers[0].train_dataset[f"ref_{side}_logp"][:4]) for side in ("chosen", "rejected")
    )
    margins = -0.5 * 0.1 * (chosen - rejected)  # (α − 1)·β·(ρ_w − ρ_l)
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[1] == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), rel=1e-4)


def test_init_disables_dropout(tokenizer, config):
    model = make_model("gpt2").train()
    make_trainer(config(), tokenizer, model)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_train_lora_keeps_the_base_model_and_starts_at_it(tokenizer, config, tmp_path):
    peft = pytest.importorskip("peft")
    base = make_model()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    args = config(beta=0.5, learning_rate=1e-2, max_steps=6)
    trainer = make_trainer(args, tokenizer, base, peft_config=lora)
    trainer.train()
    found = losses(args.output_dir)
    assert found[0] == pytest.approx(0.693147, abs=1e-5) and min(found[1:]) < 0.69
    after = {name.replace("base_layer.", ""): p for name, p in trainer.model.get_base_model().named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trainer.save_model(str(tmp_path / "adapter"))
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}


def test_train_lora_caches_the_reference_whatever_the_adapters_seed(tokenizer, config, monkeypatch):
    peft = pytest.importorskip("peft")
    from hdpo_train import reference

    passes, compute = [], reference._compute
    monkeypatch.setattr(reference, "_compute", lambda *args: passes.append(1) or compute(*args))
    for seed in (0, 1):
        lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        make_trainer(config(seed=seed), tokenizer, peft_config=lora)
    assert len(passes) == 1


def test_init_with_a_peft_model_takes_its_adapter_as_reference(tokenizer, config):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(make_model(), lora)
    args = config(max_steps=1)
    make_trainer(args, tokenizer, model).train()
    assert losses(args.output_dir)[0] == pytest.approx(0.693147, abs=1e-5)


def test_init_does_not_take_one_adapters_cache_for_anothers(tokenizer, config):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    found = []
    for seed in (0, 1):
        base = make_model()
        torch.manual_seed(seed)
        trainer = make_trainer(config(), tokenizer, peft.get_peft_model(base, lora))
        found.append(trainer.train_dataset["ref_chosen_logp"][:])
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_init_refuses_what_it_would_have_to_ignore(tokenizer, config):
    with pytest.raises(ValueError, match="compute_metrics has no place here: no logits"):
        make_trainer(config(), tokenizer, compute_metrics=lambda prediction: {})
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        config(use_liger_kernel=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be from 1e-9 to 1e9 .*, got 0.0"),
        ({"beta": -0.1}, "beta must be from 1e-9 to 1e9 .*, got -0.1"),
        ({"loss_type": "dpo"}, "loss_type must be one of sigmoid, hinge, ipo, .*; got 'dpo'"),
        ({"loss_type": "no.py:f"}, "loss_type no.py:f: there is no file no.py"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "a weight for each loss"),
        ({"alpha_level": "word"}, "alpha_level must be one of sequence, token; got 'word'"),
        ({"alpha_level": "token", "loss_type": "ipo"}, "by token already: leave out alpha_level"),
        ({"label_smoothing": 0.5}, r"in \[0, 0.5\); got 0.5"),
        ({"label_smoothing_factor": 0.1}, "use label_smoothing"),
        ({"on_bad_record": "ignore"}, "'stop' or 'drop', got 'ignore'"),
        ({"gradient": "filtered"}, "gradient must be 'exact' or 'sampled', got 'filtered'"),
        ({"gradient": "sampled", "epsilon": 0.0}, r"epsilon must be in \(0, 0.5\], got 0.0"),
        ({"gradient": "sampled", "epsilon": 0.6}, r"epsilon must be in \(0, 0.5\], got 0.6"),
        ({"max_length": 0}, "max_length must be a positive whole number or None, got 0"),
    ],
)
def test_config_refuses_values_out_of_range(options, message, config):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_init_refuses_what_cannot_be_trained(tokenizer, config):
    with pytest.raises(ValueError, match="neither train_dataset nor eval_dataset"):
        HDPOTrainer(make_model(), args=config(), processing_class=tokenizer)
    model = make_model()
    with pytest.raises(ValueError, match="ref_model is the model itself"):
        make_trainer(config(), tokenizer, model, ref_model=model)
    with pytest.raises(TypeError, match="args must be an HDPOConfig"):
        from transformers import TrainingArguments

        make_trainer(TrainingArguments(output_dir="x", use_cpu=True), tokenizer)
    with pytest.raises(ValueError, match=r"no tokenizer can be loaded from .*save_pretrained"):
        HDPOTrainer(model, args=config(), train_dataset=Dataset.from_list(make_records()))


def test_init_refuses_a_tokenizer_larger_than_the_head(tokenizer, config):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **small))
    with pytest.raises(ValueError, match=r"token id \d+, but the model's head has 50 entries"):
        make_trainer(config(), tokenizer, model)


def test_init_counts_bad_records_and_drops_them_on_request(tokenizer, config, caplog):
    records = [*make_records(4), {"prompt": "a", "chosen": "", "rejected": "b"}]
    with pytest.raises(ValueError, match=r"1 of the 5 records.*\n.*record 5"):
        make_trainer(config(), tokenizer, records=records)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(config(on_bad_record="drop"), tokenizer, records=records)
    assert len(trainer.train_dataset) == 4 and "record 5" in caplog.text


def test_train_in_bf16_autocast_starts_at_zero_rewards(tokenizer, config):
    """Reference and policy run in the same precision: nothing of bf16 is left in the rewards of step 0."""
    args = config(max_steps=1, bf16=True)
    make_trainer(args, tokenizer).train()
    line = read_metrics(args.output_dir)[1]
    assert abs(line["rewards/margins"]) < 5e-3
    assert line["loss"] == pytest.approx(0.693147, abs=3e-3)


def test_metrics_file_survives_a_cut_last_line(tokenizer, config):
    args = config(max_steps=4, save_strategy="steps", save_steps=2)
    make_trainer(args, tokenizer).train()
    path = Path(args.output_dir) / METRICS_FILE
    path.write_text(path.read_text()[:-15])
    make_trainer(args, tokenizer).train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-2"))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4, 4]


def test_config_defaults_are_safe():
    args = HDPOConfig(output_dir="x", use_cpu=True)
    assert args.bf16 is False and args.logging_nan_inf_filter is False and args.alpha == 1.0


def killed_in_a_worker(examples):
    assert torch.utils.data.get_worker_info() is not None
    os.kill(os.getpid(), signal.SIGKILL)


def test_train_takes_the_split_of_a_dict_and_says_that_a_worker_was_killed(tokenizer, config):
    splits = DatasetDict({"test": Dataset.from_list(make_records(2)), "train": Dataset.from_list(make_records(8))})
    args = config(dataloader_num_workers=1)
    trainer = HDPOTrainer(make_model(), args=args, train_dataset=splits, processing_class=tokenizer)
    assert len(trainer.train_dataset) == 8
    trainer.data_collator = killed_in_a_worker
    with pytest.raises(ChildProcessError, match="dataloader_num_workers=1 was killed"):
        trainer.train()
