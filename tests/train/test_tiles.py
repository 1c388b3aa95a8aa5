"""MLPs on tiles of tokens: the same steps, with no more than a tile inside an MLP at any time."""

import pytest
from transformers import AutoModelForCausalLM as Auto
from transformers import OPTConfig

from hdpo_train import tiles
from hdpo_train.models import disable_dropout
from hdpo_train.report import read_metrics
from hdpo_train.tiles import tile_mlps
from tests.train.test_packing import SHARED, assert_same_step, make, make_examples, step, step_alone, with_loss
from tests.train.tiny import VOCAB


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_tile_mlps_takes_the_step_of_each_sequence_alone(name, checkpointing, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 7)
    model, examples = with_loss(name), make_examples()
    disable_dropout(model)
    alone = step_alone(model, examples)
    tile_mlps(model)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
        model.train()
    assert_same_step(step(model, examples, SHARED), alone)


def test_tile_mlps_has_one_tile_inside_an_mlp(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 7)
    model, seen = with_loss("llama"), []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    tile_mlps(model)
    seen.clear()
    step(model, make_examples(count=1, prompt=(20, 20), completion=(3, 3)), SHARED)  # 26 tokens
    assert [shape[1] for shape in seen] == [7, 7, 7, 5, 5, 7, 7, 7], "forward, then backward"


@pytest.mark.parametrize(
    ("name", "reason"), [("gpt-oss", "give more than a vector for each token"), ("opt", "are not called mlp")]
)
def test_tile_mlps_refuses_what_it_cannot_tile(name, reason):
    opt = OPTConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    model = Auto.from_config(opt) if name == "opt" else make(name)
    with pytest.raises(ValueError, match=f"tiled_mlp cannot be used: the MLPs of {type(model).__name__} {reason}"):
        tile_mlps(model)


def test_train_with_tiled_mlp_and_an_adapter_takes_the_same_steps(tokenizer, config, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    from tests.train.test_trainer import make_trainer

    monkeypatch.setattr(tiles, "TILE", 7)
    losses = []
    for tiled in (False, True):
        lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        args = config(tiled_mlp=tiled, gradient_checkpointing=True, max_steps=2, output_dir=str(tmp_path / str(tiled)))
        trainer = make_trainer(args, tokenizer, peft_config=lora)
        trainer.train()
        losses.append([line["loss"] for line in read_metrics(args.output_dir) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[0])) > 1
