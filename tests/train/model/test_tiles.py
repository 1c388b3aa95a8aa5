"""Layers in tiles: the same steps, with no more than a tile inside an MLP and a sequence inside a layer at any time."""

import functools

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, OPTConfig, modeling_utils
from transformers import AutoModelForCausalLM as Auto

from hdpo_train.model import packing, tiles
from hdpo_train.model.attention import Documents
from hdpo_train.model.loading import disable_dropout
from hdpo_train.model.packing import PADDED
from hdpo_train.model.tiles import tile_sequences, tile_tokens
from hdpo_train.plan import room
from hdpo_train.plan.memory import MicroBatch, step_memory
from hdpo_train.plan.step import peak_memory
from hdpo_train.run.report import read_metrics
from tests.train.model.test_packing import (
    MODELS,
    PACKED,
    SHARED,
    assert_same_step,
    make,
    make_examples,
    step,
    step_alone,
    varlen,
    with_loss,
)
from tests.train.tiny import VOCAB, Elsewhere, make_model

UNEQUAL = make_examples(2, count=1, prompt=(3, 3), completion=(20, 60)) + make_examples(3, count=4)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 20)


def tile(model, mlps=True, **options):
    """Checkpointed, in training mode, and in tiles."""
    disable_dropout(model)
    model.gradient_checkpointing_enable(**options)
    model.enable_input_require_grads()
    if mlps:
        tile_tokens(model)
    tile_sequences(model)
    return model.train()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_tiled_layers_take_the_step_of_each_sequence_alone(name, reentrant, library_log):
    model = with_loss(name)
    alone = step_alone(model, UNEQUAL)
    tile(model, mlps=name != "gpt-oss", gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for layout in (PADDED, PACKED, SHARED):
        assert_same_step(step(model, UNEQUAL, layout), alone)
    assert "at once" not in library_log.text


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_tiled_mlps_alone_take_the_step_of_each_sequence_alone(name):
    model = with_loss(name)
    alone = step_alone(model, UNEQUAL)
    tile_tokens(model)
    assert_same_step(step(model, UNEQUAL, SHARED), alone)


def test_tiled_mlps_have_one_tile_inside(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 7)
    model, seen = with_loss("llama"), []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    tile_tokens(model)
    seen.clear()
    step(model, make_examples(count=1, prompt=(20, 20), completion=(3, 3)), SHARED)  # 26 tokens
    assert [shape[1] for shape in seen] == [7, 7, 7, 5, 5, 7, 7, 7], "forward, then backward"


def pairs(*lengths):
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    refs = {"ref_chosen_logp": -9.0, "ref_rejected_logp": -9.0}
    return [{name: [1] * size for name, size in zip(ids, pair, strict=True)} | refs for pair in lengths]


@pytest.mark.parametrize(
    ("layout", "lengths", "pieces"),
    [
        (PACKED, [(3, 20, 27)], [23, 30]),
        (PACKED, [(2, 3, 4), (2, 3, 4), (30, 1, 2)], [5 + 6 + 5, 6, 31, 32]),  # short ones together
        (SHARED, [(3, 20, 27)], [23, 30]),  # the prompt with each completion
        (SHARED, [(30, 20, 27)], [77]),  # computed twice, it would cost more than it saves
        (SHARED, [(2, 3, 4), (2, 3, 5), (9, 2, 2)], [9 + 10, 13]),
        (PADDED, [(2, 3, 4), (2, 3, 4), (2, 3, 4)], [18, 18]),  # 3 rows of 6
        (SHARED, [(2, 3, 4), (2, 3, 5)], [19]),
    ],
)
def test_checkpointed_layers_run_on_one_sequence_at_a_time(layout, lengths, pieces):
    model, seen = tile(with_loss("llama"), mlps=False), []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, inputs, kwargs: seen.append(kwargs["hidden_states"].shape[:2].numel()), with_kwargs=True
    )
    step(model, pairs(*lengths), layout)
    assert seen == pieces + pieces[::-1], "forward, then backward"


def test_tiled_layers_offload_what_they_are_recomputed_from(monkeypatch):
    monkeypatch.setattr(modeling_utils, "save_on_cpu", elsewhere := Elsewhere())
    model = with_loss("llama")
    alone = step_alone(model, UNEQUAL)
    tile(model, offload=True)
    assert_same_step(step(model, UNEQUAL, PACKED), alone)
    tokens = sum(2 * len(e["prompt_ids"]) + len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in UNEQUAL)
    assert elsewhere.nbytes == 2 * tokens * 32 * 4, "layers, tokens, width, bytes"


def test_tiled_layers_with_flash_attention(monkeypatch):
    monkeypatch.setattr(packing, "_is_flash", lambda config: "varlen" in config._attn_implementation)
    AttentionInterface.register("varlen_stand_in", varlen)
    model, seen = with_loss("llama"), []
    alone = step_alone(model, UNEQUAL)
    model.set_attn_implementation("varlen_stand_in")
    tile(model).model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    assert_same_step(step(model, UNEQUAL, PACKED), alone)
    longest = max(len(e["prompt_ids"] + e[side]) for e in UNEQUAL for side in ("chosen_ids", "rejected_ids"))
    assert max(seen) == longest


def test_checkpointed_layers_that_share_more_than_hidden_states_run_as_they_are(library_log):
    function, shared = tiles._BySequences(lambda layer, *args: layer(*args)), {}

    def layer(hidden, attention_mask, states):
        states[0] = hidden
        return hidden

    hidden = torch.randn(1, 60, 4)
    for _ in range(2):
        called = functools.partial(layer, attention_mask=Documents([(30,), (30,)]), states=shared)
        assert function(called, hidden) is hidden is shared[0]
    assert "run on all sequences of a micro-batch at once: a dict that they get cannot be divided" in library_log.text


def test_tiled_layers_take_less_memory(config, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 4096)
    llama = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    batch = MicroBatch(SHARED, [(100, 16_000, 14_000)])
    peaks = []
    for tiled in (False, True):
        args = config(tiled_layers=tiled, gradient_checkpointing=True)
        peaks.append(peak_memory(llama, args, batch, Auto.from_config).total)
    assert peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize(
    ("name", "reason"), [("gpt-oss", "give more than a vector for each token"), ("opt", "are not called mlp")]
)
def test_tile_tokens_refuses_what_it_cannot_tile(name, reason):
    opt = OPTConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    model = Auto.from_config(opt) if name == "opt" else make(name)
    with pytest.raises(ValueError, match=f"tiled_layers cannot be used: the MLPs of {type(model).__name__} {reason}"):
        tile_tokens(model)


@pytest.mark.parametrize("adapter", [False, True])
def test_train_in_tiles_takes_the_same_steps(adapter, tokenizer, config, tmp_path):
    peft = pytest.importorskip("peft")
    from tests.train.test_trainer import make_trainer

    losses = []
    options = dict(gradient_checkpointing=True, gradient_accumulation_steps=2, max_steps=2)
    for tiled in (False, True):
        lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
        args = config(tiled_layers=tiled, output_dir=str(tmp_path / str(tiled)), **options)
        trainer = make_trainer(args, tokenizer, peft_config=lora)
        trainer.train()
        functions = [layer._gradient_checkpointing_func for layer in trainer.model.modules() if hasattr(layer, "mlp")]
        assert all(isinstance(function, tiles._BySequences) == tiled for function in functions) and functions
        losses.append([line["loss"] for line in read_metrics(args.output_dir) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[0])) > 1


# ---- on by themselves ------------------------------------------------------------------------------------------------


def started(config, tokenizer, model=None, **options):
    from tests.train.test_trainer import make_trainer

    return make_trainer(config(gradient_checkpointing=True, **options), tokenizer, model)


def test_tiles_are_on_where_a_step_does_not_fit(config, tokenizer, monkeypatch, library_log):
    monkeypatch.setattr(room, "room", lambda *_: 100_000)
    trainer = started(config, tokenizer, max_steps=1)
    assert trainer.tiled and "tiled_layers: on, as a step on the longest pairs ((" in library_log.text
    assert "would take" in library_log.text and "of 97.7 KiB; so " in library_log.text
    trainer.train()
    assert not started(config, tokenizer, tiled_layers=False).tiled


def test_tiles_that_save_nothing_stay_off(config, tokenizer, monkeypatch, library_log):
    monkeypatch.setattr(tiles, "TILE", 4096)
    monkeypatch.setattr(room, "room", lambda *_: 100_000)
    assert not started(config, tokenizer).tiled and "tiled_layers" not in library_log.text


def test_a_step_that_plainly_fits_is_not_looked_at(config, tokenizer, monkeypatch, library_log):
    monkeypatch.setattr(room, "step_memory", lambda *_: pytest.fail("seconds for nothing"))
    for family in ("llama", "gpt2"):
        assert not started(config, tokenizer, make_model(family)).tiled
    assert "tiled_layers" not in library_log.text


def test_an_estimate_that_fails_stops_no_run(config, tokenizer, monkeypatch, library_log):
    monkeypatch.setattr(room, "room", lambda *_: 1 / 0)
    assert not started(config, tokenizer).tiled
    assert "tiled_layers: off; whether a step fits cannot be told (ZeroDivisionError: " in library_log.text


def test_tiles_that_are_on_by_themselves_leave_mlps_of_another_kind_out(config, tokenizer, monkeypatch, library_log):
    monkeypatch.setattr(room, "room", lambda *_: 100_000)
    assert started(config, tokenizer, make("gpt-oss"), router_aux_loss_coef=0.0).tiled
    assert "the MLPs of GptOssForCausalLM give more than a vector for each token, and stay" in library_log.text
    with pytest.raises(ValueError, match="tiled_layers cannot be used: the MLPs of GptOssForCausalLM"):
        started(config, tokenizer, make("gpt-oss"), tiled_layers=True, router_aux_loss_coef=0.0)


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({"per_device_train_batch_size": 2}, [(1, 900, 800), (500, 10, 10)]),
        ({"per_device_train_batch_size": 9, "max_tokens_per_batch": 1000}, [(1, 900, 800)]),
        ({"per_device_train_batch_size": 9, "max_tokens_per_batch": 1800}, [(1, 900, 800), (5, 6, 7)]),
    ],
)
def test_largest_micro_batch_that_may_come(config, options, pairs):
    lengths = [(5, 6, 7), (500, 10, 10), (1, 900, 800), (5, 60, 70)][:: 1 if len(options) == 1 else 2]
    assert room.largest(lengths, config(**options), SHARED).pairs == pairs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [*MODELS])
def test_bound_is_above_what_a_step_takes(name, checkpointing, config):
    model, args = make(name), config(gradient_checkpointing=checkpointing)
    for layout in (PADDED, SHARED):
        batch = MicroBatch(layout, [(10, 9000, 8000)])
        spare = 0 if name in ("gemma2", "gpt-oss") else room._CONSTANT  # which is for the scores of these
        assert step_memory(model, args, batch).total < room.bound(model, args, batch) - spare
