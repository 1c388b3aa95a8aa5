"""--load_in_4bit and --load_in_8bit: adapters on a quantized base model, from the command line to what is saved."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from hdpo_train import training
from hdpo_train.options import parse_options
from hdpo_train.training import train
from tests.train.cli.test_errors import refused
from tests.train.tiny import make_model, make_records

needs_bitsandbytes = pytest.mark.skipif(
    not is_bitsandbytes_available(), reason="quantized models need the package bitsandbytes"
)


@pytest.fixture
def command(tmp_path, tokenizer):
    """Words of a run on tmp_path/model and tmp_path/pairs.jsonl."""
    pytest.importorskip("peft")
    make_model(spread=1.0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in make_records(4)))
    paths = {"model_name_or_path": "model", "dataset_name": "pairs.jsonl", "output_dir": "out", "ref_cache_dir": "ref"}
    words = [f"--{name}={tmp_path / path}" for name, path in paths.items()]
    steps = ["--max_steps=4", "--save_steps=2", "--logging_steps=1", "--learning_rate=1e-2", "--beta=0.5"]
    return [*words, *steps, "--per_device_train_batch_size=4", "--use_cpu=True", "--report_to=none"]


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4", "8"])
def test_an_adapter_is_trained_on_a_quantized_model(command, tmp_path, bits):
    peft = pytest.importorskip("peft")
    options = ["--use_bnb_nested_quant", "--gradient_checkpointing"] if bits == "4" else []
    trainer = train(*parse_options([*command, "--use_peft", f"--load_in_{bits}bit", *options]))
    base = trainer.model.get_base_model()
    assert base.lm_head.weight.dtype == torch.float32
    layers = [m for name, m in base.model.layers.named_modules() if name.endswith("base_layer")]
    assert len(layers) == 14 and {m.weight.dtype for m in layers} == {torch.uint8 if bits == "4" else torch.int8}
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert logs[0]["rewards/chosen"] == 0 and logs[-1]["loss"] < 0.9 * logs[0]["loss"]

    quantization = BitsAndBytesConfig(
        **{f"load_in_{bits}bit": True}, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4"
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantization, dtype="float32")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "out").train()  # evaluation may round more on a CPU
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


@needs_bitsandbytes
def test_a_run_on_a_quantized_model_resumes(command, tmp_path):
    words = [*command, "--use_peft", "--load_in_4bit", "--lr_scheduler_type=constant"]
    whole = train(*parse_options(words))
    words = [word.replace(str(tmp_path / "out"), str(tmp_path / "two")) for word in words]
    train(*parse_options([*words, "--max_steps=2"]))
    resumed = train(*parse_options([*words, "--resume_from_checkpoint"]))
    assert [line["step"] for line in resumed.state.log_history if "loss" in line] == [1, 2, 3, 4]
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name


def test_what_a_quantized_run_lacks_is_named(command, capsys, monkeypatch):
    for options, reason in (
        (["--load_in_4bit"], "load_in_4bit rounds the model's weights, which cannot be trained so: set use_peft"),
        (["--load_in_4bit", "--load_in_8bit", "--use_peft"], "loaded in one of the two"),
        (["--use_bnb_nested_quant"], "use_bnb_nested_quant=True has no effect without load_in_4bit"),
        (
            ["--load_in_4bit", "--use_peft", '--model_init_kwargs={"quantization_config": {}}'],
            "--load_in_4bit and the quantization_config of --model_init_kwargs are given",
        ),
        (["--load_in_8bit", "--use_peft", "--model_name_or_path=x.gguf"], "load_in_8bit is not for a GGUF file"),
    ):
        assert reason in refused(command + options, capsys)
    monkeypatch.setattr(training, "is_bitsandbytes_available", lambda: False)
    message = refused([*command, "--load_in_8bit", "--use_peft"], capsys)
    assert "--load_in_8bit needs the package bitsandbytes: pip install 'hdpo[train,peft,quantization]'" in message
    message = refused(["plan", *command, "--load_in_4bit", "--use_peft"], capsys)
    assert "a plan knows no quantized weights: leave out load_in_4bit" in message
