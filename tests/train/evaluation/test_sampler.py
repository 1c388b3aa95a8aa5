"""Samples: from the model's own distribution, with its entropy, the same however often a run was killed."""

import copy
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hdpo_train.evaluation.problems import Problem
from hdpo_train.evaluation.sampler import Sampler, SamplingOptions, answers, encode
from hdpo_train.evaluation.samples import before_stop
from hdpo_train.model.fingerprint import files_fingerprint, weights_fingerprint
from hdpo_train.model.generation import decoder, entropies, own_entropy
from hdpo_train.model.head import find_transform
from tests.train.tiny import FAMILIES, VOCAB, make_chain, make_model
from tests.train.tokenizers_of_kinds import KINDS, tokenizers_of_kinds

PROBLEMS = [Problem("a", {}), Problem("Say bcd efg:", {}), Problem("2. Say sun", {})]
OPTIONS = SamplingOptions(num_samples=3, temperatures=(0, 0.7, 1), max_new_tokens=6, batch_size=4)


def entropy(p: float) -> float:
    return -(p * math.log(p) + (1 - p) * math.log(1 - p))


@pytest.mark.parametrize(("temperature", "p"), [(1.0, 0.75), (0.5, 0.9), (2.0, 3**0.5 / (1 + 3**0.5))])
def test_sampler_draws_a_known_distribution_and_knows_its_entropy(temperature, p, tokenizer):
    """After any letter: "a" with probability 0.75, or "b"; then the end. p ∝ 0.75^(1/T)."""
    x, a, b = (tokenizer(letter)["input_ids"][0] for letter in "xab")
    end = tokenizer.eos_token_id
    model = make_chain({x: {a: 0.75, b: 0.25}, a: {end: 1.0}, b: {end: 1.0}})
    options = SamplingOptions(4000, (temperature,), max_new_tokens=5, batch_size=1000)
    samples = Sampler([Problem("x", {})], tokenizer, options).run(model)
    counts = Counter(sample.completion for sample in samples)
    assert set(counts) == {"a", "b"} and counts["a"] / 4000 == pytest.approx(p, abs=4.5 * (p * (1 - p) / 4000) ** 0.5)
    assert all(sample.ended and sample.num_tokens == 2 for sample in samples)  # the end is certain, and a token
    assert [sample.entropy for sample in samples] == pytest.approx([entropy(p)] * 4000, rel=1e-5)


def test_sampler_at_temperature_0_takes_the_likeliest_and_gives_the_models_entropy(tokenizer):
    x, a, b = (tokenizer(letter)["input_ids"][0] for letter in "xab")
    model = make_chain({x: {a: 0.4, b: 0.6}, b: {a: 1.0}, a: {a: 1.0}})
    (sample,) = Sampler([Problem("x", {})], tokenizer, replace(OPTIONS, temperatures=(0,))).run(model)
    assert sample.completion == "baaaaa" and sample.num_tokens == 6 and not sample.ended
    assert sample.entropy == pytest.approx(entropy(0.4), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_keeps_the_space_that_a_completion_begins_with(kind):
    tokenizer = tokenizers_of_kinds()[kind]
    prompt, completion = "Question: how many eggs?", " there are 12"
    ids, with_completion = (tokenizer(text)["input_ids"] for text in (prompt, prompt + completion))
    if ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    assert decoder(tokenizer)(with_completion[len(ids) :]) == completion  # EOS is left out


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama-tied"])
def test_entropies_are_those_of_the_logits(family, temperature):
    """Softmax of the model's own logits, text by text: padding, softcap, scale and bias must not matter."""
    model = make_model(family, spread=20.0)
    rng = random.Random(0)
    prompts, completions = ([rng.choices(range(VOCAB), k=n) for n in sizes] for sizes in ((1, 7, 3), (5, 1, 2)))
    found = entropies(model, find_transform(model), prompts, completions, temperature)
    for prompt, completion, nats in zip(prompts, completions, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
        logp = (logits / temperature).log_softmax(-1)
        assert nats == pytest.approx(-(logp.exp() * logp).sum().item(), rel=1e-5)


def test_sampler_stop_ends_a_completion_and_counts_as_the_end_does(tokenizer):
    """x → a or b; a → c, b → a: "bac", "ac", … stopped by "ac", whose tokens are the last that count."""
    x, a, b, c = (tokenizer(letter)["input_ids"][0] for letter in "xabc")
    model = make_chain({x: {a: 0.5, b: 0.5}, b: {a: 1.0}, a: {c: 0.25, b: 0.75}, c: {c: 1.0}})
    options = SamplingOptions(64, max_new_tokens=200, batch_size=64, stop=("ac", "never"))
    samples = Sampler([Problem("x", {})], tokenizer, options).run(model)
    assert {s.completion for s in samples} >= {"", "b"} and all(set(s.completion) <= {*"ab"} for s in samples)
    for sample in samples:  # each "a" is a choice of c or b, the first token one of a or b
        choices = sample.completion.count("a") + 1
        assert sample.ended and sample.num_tokens == len(sample.completion) + 2
        assert sample.entropy == pytest.approx(math.log(2) + choices * entropy(0.25), rel=1e-4)


def test_sampler_stop_only_shortens_what_is_drawn(tokenizer):
    model, options = make_model(spread=5.0), replace(OPTIONS, temperatures=(1,), num_samples=8, max_new_tokens=16)
    whole = Sampler(PROBLEMS, tokenizer, options).run(model)
    stop = ("wind", "in", "o", "u", "Q")
    cut = Sampler(PROBLEMS, tokenizer, replace(options, stop=stop)).run(model)
    assert [s.completion for s in cut] == [before_stop(s.completion, stop) for s in whole]
    changed = [(one, other) for one, other in zip(cut, whole, strict=True) if one != other]
    assert len(changed) >= 3 and all(one.num_tokens <= other.num_tokens and one.ended for one, other in changed)


def test_sampler_stop_does_not_begin_in_the_prompt_and_ends_generation_early(tokenizer, monkeypatch):
    x, a = (tokenizer(letter)["input_ids"][0] for letter in "xa")
    model = make_chain({x: {a: 1.0}, a: {a: 1.0}})
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    options = SamplingOptions(1, (0,), max_new_tokens=100, stop=("aaa", "xa"))
    (sample,) = Sampler([Problem("x", {})], tokenizer, options, entropy=False).run(model)
    assert (sample.completion, sample.num_tokens, sample.ended, len(steps)) == ("", 3, True, 3)


def test_own_entropy_is_that_of_one_answer_to_each_prompt(tokenizer):
    x, a, b = (tokenizer(letter)["input_ids"][0] for letter in "xab")
    end = tokenizer.eos_token_id
    model = make_chain({x: {a: 0.3, b: 0.7}, a: {end: 1.0}, b: {end: 1.0}})
    before = torch.get_rng_state()
    nats, tokens = own_entropy(model, tokenizer, [[x]] * 5, 9, seed=0, batch_size=2)
    assert nats == pytest.approx(5 * entropy(0.3), rel=1e-4) and tokens == 5 * 2
    assert torch.equal(torch.get_rng_state(), before)


def test_own_entropy_cuts_answers_where_the_positions_of_the_model_end(tokenizer):
    # A prompt and the longest completion, which is another prompt's, may have more tokens than the model takes.
    model, positions = make_model("gpt2"), 256
    nats, tokens = own_entropy(model, tokenizer, [[5] * (positions - 3), [7] * 10], 20, seed=0)
    assert 0 < nats < float("inf") and 2 <= tokens <= 3 + 20


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sampler_pads_without_a_trace(family, tokenizer):
    model, greedy = make_model(family, spread=20.0), replace(OPTIONS, temperatures=(0,))
    together, apart = (
        Sampler(PROBLEMS, tokenizer, replace(greedy, batch_size=size)).run(model) for size in (len(PROBLEMS), 1)
    )
    for one, other in zip(together, apart, strict=True):
        assert one.completion == other.completion and one.entropy == pytest.approx(other.entropy, rel=1e-5)


def test_sampler_ignores_what_the_generation_config_says_of_sampling(tokenizer):
    model = make_model(spread=20.0)
    expected = Sampler(PROBLEMS, tokenizer, OPTIONS).run(model)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=9.0, min_new_tokens=6, num_beams=2,
        suppress_tokens=list(range(40, 200)), max_length=7, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    before = copy.deepcopy(model.generation_config)
    assert Sampler(PROBLEMS, tokenizer, OPTIONS).run(model) == expected
    assert model.generation_config == before


def test_sampler_stops_at_every_end_of_the_generation_config(tokenizer):
    x, a, b = (tokenizer(letter)["input_ids"][0] for letter in "xab")
    model = make_chain({x: {a: 0.5, b: 0.5}, a: {a: 1.0}, b: {x: 1.0}})
    model.generation_config.eos_token_id = [a, VOCAB - 1]
    options = SamplingOptions(16, max_new_tokens=9, batch_size=5)
    samples = Sampler([Problem("x", {})], tokenizer, options).run(model)
    ended = [sample for sample in samples if sample.ended]
    assert {sample.num_tokens for sample in ended} > {1, 3}  # a, bxa, bxbxa …
    assert all(sample.entropy == pytest.approx(math.log(2) * (sample.num_tokens + 1) / 2, rel=1e-3) for sample in ended)
    assert {sample.completion for sample in ended} >= {"a", "bxa"}


def test_sampler_takes_any_tokenizer(tokenizer):
    """Without a pad token, without an end, padding on either side: the samples are the same."""
    model = make_model(spread=5.0)
    expected = Sampler(PROBLEMS, tokenizer, OPTIONS).run(model)
    for side in ("left", "right"):
        bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, padding_side=side)
        found = Sampler(PROBLEMS, bare, OPTIONS).run(model)  # the model's config knows the end
        assert [sample.num_tokens for sample in found] == [sample.num_tokens for sample in expected]
        assert [sample.entropy for sample in found] == [sample.entropy for sample in expected]


def test_sampler_leaves_torchs_generator_and_the_models_mode_alone(tokenizer):
    model = make_model(spread=1.0).train()
    state = torch.get_rng_state()
    first = Sampler(PROBLEMS, tokenizer, OPTIONS).run(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    torch.rand(3)
    assert Sampler(PROBLEMS, tokenizer, OPTIONS).run(model) == first
    assert Sampler(PROBLEMS, tokenizer, replace(OPTIONS, seed=1)).run(model) != first
    assert [(s.prompt, s.temperature, s.number) for s in first] == [
        (prompt, t, number) for t, n in ((0, 1), (0.7, 3), (1, 3)) for prompt in range(3) for number in range(n)
    ]


def test_sampler_draws_the_same_without_entropy(tokenizer):
    model = make_model(spread=5.0)
    expected = Sampler(PROBLEMS, tokenizer, OPTIONS).run(model)
    found = Sampler(PROBLEMS, tokenizer, OPTIONS, entropy=False).run(model)
    assert found == [sample._replace(entropy=None) for sample in expected]


def test_answers_groups_by_prompt(tokenizer):
    found = answers(make_model(spread=1.0), tokenizer, ["a", "b"], SamplingOptions(3, max_new_tokens=4))
    assert [len(texts) for texts in found] == [3, 3] and len(set(found[0])) > 1


def kept(tokenizer, path, problems=PROBLEMS, options=OPTIONS, fingerprint="x"):
    sampler = Sampler(problems, tokenizer, options)
    sampler.keep_in(path, fingerprint)
    return sampler


def test_sampler_killed_anywhere_ends_with_the_same_samples(tokenizer, tmp_path):
    model, path = make_model(spread=5.0), tmp_path / "samples.jsonl"
    samples = kept(tokenizer, path).run(model)
    assert samples == Sampler(PROBLEMS, tokenizer, OPTIONS).run(model)  # kept or not
    whole = path.read_bytes()
    for size in (0, 30, len(whole) // 3, len(whole) // 2, whole.rindex(b"\n", 0, -1) + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert kept(tokenizer, path).run(model) == samples
        assert path.read_bytes() == whole


def test_sampler_refuses_a_file_of_other_settings(tokenizer, tmp_path):
    path, options = tmp_path / "samples.jsonl", replace(OPTIONS, temperatures=(0,), max_new_tokens=2)
    kept(tokenizer, path, options=options).run(make_model())
    others = {
        "seed": {"options": replace(options, seed=9)},
        "max_new_tokens": {"options": replace(options, max_new_tokens=3)},
        "temperatures": {"options": replace(options, temperatures=(0, 1))},
        "batch_size": {"options": replace(options, batch_size=3)},
        "num_samples": {"options": replace(options, num_samples=9)},
        "prompts": {"problems": PROBLEMS[:2]},
        "model": {"fingerprint": "y"},
        "stop": {"options": replace(options, stop=("\n",))},
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"samples with {name} = .*, this call has {name} = "):
            kept(tokenizer, path, **{"options": options, **other})
    stopped = replace(options, stop=("b", "a"))
    kept(tokenizer, tmp_path / "stopped.jsonl", options=stopped).run(make_model())
    assert kept(tokenizer, tmp_path / "stopped.jsonl", options=replace(options, stop=("a", "b"))).missing == 0
    with pytest.raises(ValueError, match=r"samples with stop = \['a', 'b'\], this call has stop = None"):
        kept(tokenizer, tmp_path / "stopped.jsonl", options=options)


def test_sampler_knows_what_is_missing(tokenizer, tmp_path):
    model, path = make_model(spread=5.0), tmp_path / "samples.jsonl"
    sampler = kept(tokenizer, path)
    assert sampler.missing == 1 + 3 + 3 and sampler.samples == []
    samples = sampler.run(model)
    again = kept(tokenizer, path)
    assert sampler.missing == again.missing == 0 and again.samples == samples


def test_weights_fingerprint_is_of_weights_and_ends():
    first = weights_fingerprint(make_model())
    assert first == weights_fingerprint(make_model()) != weights_fingerprint(make_model(seed=1))
    assert weights_fingerprint(make_model().to(torch.bfloat16)) != first
    model = make_model()
    model.generation_config.eos_token_id = [0, 5]
    assert weights_fingerprint(model) != first


def test_files_fingerprint_is_of_weights_and_config(tmp_path):
    for seed, name in enumerate(("a", "b")):
        make_model(seed=seed).save_pretrained(tmp_path / name)
    first = files_fingerprint(str(tmp_path / "a"))
    (tmp_path / "a" / "optimizer.pt").write_bytes(b"x")
    assert files_fingerprint(str(tmp_path / "a")) == first != files_fingerprint(str(tmp_path / "b"))
    (tmp_path / "a" / "generation_config.json").write_text("{}")
    assert files_fingerprint(str(tmp_path / "a")) != first


def test_encode_writes_messages_by_the_chat_template(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{{ tools[0].name if tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
    )
    problem = Problem([{"role": "user", "content": "sun?"}], {"tools": '[{"name": "T"}]'})
    assert chat.decode(encode([problem], chat)[0]) == "Tuser: sun?\nbot:"
    for broken in ("{% for i in range(10 ** 9) %}{% endfor %}", "{{ 1 // 0 }}", "{{ messages[7].role.x }}"):
        chat.chat_template = broken  # OverflowError and ZeroDivisionError are no errors of Jinja's
        with pytest.raises(ValueError, match="prompt 1: the chat template refuses the messages"):
            encode([problem], chat)
    with pytest.raises(ValueError, match="prompt 2 is of chat messages, but the tokenizer has no chat template"):
        encode([PROBLEMS[0], problem], tokenizer)
    for wrong in ([], [{"content": "x"}]):
        with pytest.raises(ValueError, match="prompt 1: "):
            encode([Problem(wrong, {})], chat)


def test_sampler_refuses_what_cannot_be_sampled(tokenizer):
    with pytest.raises(ValueError, match="there is no prompt"):
        Sampler([], tokenizer, OPTIONS)
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        Sampler([PROBLEMS[0], Problem("", {})], tokenizer, OPTIONS)
    with pytest.raises(ValueError, match=r"prompt 2 has \d+ tokens, with max_new_tokens = 250 more than the 256"):
        Sampler(PROBLEMS, tokenizer, replace(OPTIONS, max_new_tokens=250)).run(make_model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be a positive whole number, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a positive whole number, got 1.5"),
        ({"temperatures": (1, -0.5)}, "a temperature must be a number from 0 on, got -0.5"),
        ({"temperatures": (math.nan,)}, "got nan"),
        ({"temperatures": (1, 1.0)}, "a temperature is given twice"),
        ({"stop": "Question:"}, "stop must be strings that are not empty, got 'Question:'"),
        ({"stop": ("a", "")}, "stop must be strings that are not empty"),
    ],
)
def test_sampling_options_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


def test_sampler_warns_where_the_head_gives_no_entropy(tokenizer, monkeypatch):
    model = make_model()
    model.config.final_logit_softcapping = 5.0  # which Llama does not do
    warnings = []
    monkeypatch.setattr("hdpo_train.evaluation.sampler.logger.warning", warnings.append)
    samples = Sampler(PROBLEMS, tokenizer, OPTIONS).run(model)
    assert {sample.entropy for sample in samples} == {None} and {len(s.completion) > 0 for s in samples} == {True}
    (warning,) = warnings
    assert "no entropy: LlamaForCausalLM" in warning and "final_logit_softcapping=5.0" in warning


def test_sampler_stops_at_logits_that_are_not_finite(tokenizer):
    model = make_model()
    model.get_output_embeddings().weight.data[7] = math.nan
    with pytest.raises(FloatingPointError, match="broken gives prompt 1 logits that are not finite"):
        Sampler(PROBLEMS, tokenizer, OPTIONS, name="broken").run(model)
