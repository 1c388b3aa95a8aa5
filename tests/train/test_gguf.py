"""A model in a GGUF file is trained, evaluated and saved as an ordinary one; what is no such file is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hdpo_train.cli.main import main
from hdpo_train.model import loading as models
from hdpo_train.model.loading import load_model, load_tokenizer, where_from
from tests.train.cli.test_errors import refused
from tests.train.tiny import VOCAB, make_model, make_records

IDS = torch.arange(5, 25).unsqueeze(0)
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def write_gguf(path, model, tokenizer):
    """A Llama as llama.cpp writes it: names of its own, and the halves of rotary dimensions interleaved."""
    gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3] * 2 + [1] * (VOCAB - 2))  # the first two are control tokens
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)  # not the end of a text, for which transformers 5.17 would take it
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name.split("_proj")[0][-1])
        if "self_attn" in name and heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What commands name: tiny.gguf, broken.gguf, pairs.jsonl and prompts.jsonl."""
    from tests.train.conftest import tokenizer

    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", make_model(), tokenizer.__wrapped__())
    (folder / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    for name, records in (("pairs", make_records(8)), ("prompts", [{"prompt": f"{i}. Say sun:"} for i in range(3)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_model_of_a_gguf_file_is_saved_as_an_ordinary_one(folder, tmp_path, tokenizer):
    name = str(folder / "tiny.gguf")
    model, loaded = load_model(name), load_tokenizer(name)
    torch.testing.assert_close(logits(model), logits(make_model()))
    model.save_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    again, ordinary = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not any("quant" in key for key in json.loads((tmp_path / "config.json").read_text()))
    messages = [{"role": "user", "content": "Say sun"}]
    for each in (loaded, ordinary):
        assert (each.eos_token, each.pad_token, each.chat_template) == ("<eos>", "<pad>", TEMPLATE)
        assert each("1. Say sun: moon")["input_ids"] == tokenizer("1. Say sun: moon")["input_ids"]
        assert each.apply_chat_template(messages, tokenize=False) == "user: Say sun\n"


def options(folder, output_dir, **more):
    values = {
        "dataset_name": folder / "pairs.jsonl", "output_dir": output_dir, "use_cpu": True, "logging_steps": 1,
        "ref_cache_dir": output_dir.parent / "reference", "save_steps": 1, "max_steps": 2, "disable_tqdm": True,
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, **more,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_train_from_a_gguf_file_goes_as_from_the_model_saved(folder, tmp_path):
    main(["--model_name_or_path", str(folder), "--gguf_file", "tiny.gguf", *options(folder, tmp_path / "a")])
    load_model(str(folder / "tiny.gguf")).save_pretrained(tmp_path / "saved")
    load_tokenizer(str(folder / "tiny.gguf")).save_pretrained(tmp_path / "saved")
    main(["--model_name_or_path", str(tmp_path / "saved"), *options(folder, tmp_path / "b")])
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert torch.equal(logits(first), logits(second)) and not torch.equal(logits(first), logits(make_model()))
    assert len(list((tmp_path / "reference").iterdir())) == 1  # the same reference, for both
    assert json.loads((tmp_path / "a" / "run.json").read_text()) == json.loads(
        (tmp_path / "b" / "run.json").read_text()
    )


def test_train_from_a_gguf_file_goes_on_after_a_kill(folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", str(folder / "tiny.gguf"), *options(folder, out)]
    main(arguments)
    whole = (out / "model.safetensors").read_bytes()
    for name in ("checkpoint-2", "model.safetensors"):  # as if killed in the second step
        (out / name).rename(tmp_path / name)
    main([*arguments, "--resume_from_checkpoint", "true"])
    assert (out / "model.safetensors").read_bytes() == whole
    assert "changed" not in capsys.readouterr().err


def test_plan_reads_the_config_of_a_gguf_file(folder, tmp_path, capsys):
    given = ["--model_name_or_path", str(folder), "--gguf_file", "tiny.gguf", "--output_dir", str(tmp_path)]
    main(["plan", *given, "--max_length", "64", "--use_cpu", "true"])
    assert "weights" in capsys.readouterr().out


def judged(folder):
    prompts = str(folder / "prompts.jsonl")
    return ["--prompts", prompts, "--checker", "regex:[a-m]", "--max_new_tokens", "3", "--num_samples", "2"]


def test_eval_of_a_gguf_file_goes_on_with_its_samples(folder, tmp_path, monkeypatch):
    given = ["--model_name_or_path", str(folder / "tiny.gguf"), "--no_self_bleu", "--output_dir", str(tmp_path)]
    main(["eval", *given, *judged(folder)])
    drawn = (tmp_path / "samples-tiny.gguf.jsonl").read_text()
    monkeypatch.setattr("hdpo_train.cli.judging.load_model", None)  # the same file: nothing is drawn again
    main(["eval", *given, *judged(folder)])
    assert (tmp_path / "samples-tiny.gguf.jsonl").read_text() == drawn


def test_sweep_starts_from_a_gguf_file(folder, tmp_path):
    given = ["--model_name_or_path", str(folder), "--gguf_file", "tiny.gguf", "--output_dir", str(tmp_path / "sweep")]
    few = ["--alpha", "1", "--seeds", "1", "--max_steps", "1", "--temperatures", "1", "--use_cpu", "true"]
    main(["sweep", *given, *judged(folder), *few, "--dataset_name", str(folder / "pairs.jsonl")])
    assert (tmp_path / "sweep" / "sweep.md").exists()


def test_adapter_on_a_gguf_file_loads_with_it(folder, tmp_path):
    pytest.importorskip("peft")
    arguments = options(folder, tmp_path / "out", use_peft=True)
    main(["--model_name_or_path", str(folder / "tiny.gguf"), *arguments])
    adapted = load_model(str(tmp_path / "out"))
    assert not torch.equal(logits(adapted), logits(make_model()))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("{}/other.gguf", "there is no file {}/other.gguf; GGUF files in {}: broken.gguf, tiny.gguf"),
        ("{}/pairs.jsonl --gguf_file tiny", "gguf_file must name a .gguf file, got 'tiny'"),
        ("{}/tiny.gguf --gguf_file tiny.gguf", "names a GGUF file already: leave out gguf_file 'tiny.gguf'"),
        ("{}/broken.gguf", "no tokenizer can be loaded from '{}/broken.gguf'"),
    ],
)
def test_what_is_no_gguf_file_is_refused(folder, tmp_path, model, words, capsys):
    given = model.replace("{}", str(folder)).split()
    message = refused(["--model_name_or_path", *given, *options(folder, tmp_path / "out")], capsys)
    assert words.replace("{}", str(folder)) in message


def test_gguf_file_without_the_package_is_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "is_gguf_available", lambda: False)
    message = refused(["--model_name_or_path", str(folder / "tiny.gguf"), *options(folder, tmp_path / "out")], capsys)
    assert "needs the package gguf: pip install gguf" in message


def test_name_of_a_gguf_file_of_the_hub_is_taken_apart():
    pytest.importorskip("gguf")
    assert where_from("owner/repository/sub/x.gguf") == ("owner/repository", {"gguf_file": "sub/x.gguf"})
