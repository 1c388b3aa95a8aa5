"""The three texts of a record: strings, messages, and what chat templates do with them."""

import json

import datasets
import pytest
from datasets import Dataset, Features, Json, List, Value

from hdpo_train.data.forms import BadRecord, as_written, chat_prompt, from_messages, from_strings
from hdpo_train.data.tokenize import load_records, tokenize_pairs
from hdpo_train.evaluation.problems import load_problems
from tests.train.tokenizers_of_kinds import CHATML, SPECIAL, assistant, byte_level, pair, user, wrap

GENERATION = "{% if add_generation_prompt %}assistant:{% endif %}"
FOR_STRINGS = "{% for m in messages %}{{ m.role }}:{{ m.content | trim }};{% endfor %}" + GENERATION
ADDS_STRINGS = "{% for m in messages %}{{ m.role + ':' + m.content }};{% endfor %}" + GENERATION
FOR_PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}|{% endfor %};{% endfor %}" + GENERATION
)
FOR_BOTH = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %};{% endfor %}" + GENERATION
)
AS_JSON = (
    "{{ tools | tojson }}{{ options | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m | tojson }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def backend():
    return byte_level()


@pytest.fixture
def tokenizer(backend):
    return wrap(backend, chat_template=CHATML, additional_special_tokens=SPECIAL[3:])


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


# ---- nothing is filled in -------------------------------------------------------------------------------------------


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def records_with_tools(null):
    """Arguments, schemas and options of different keys; a null only if asked for."""
    more = {"limit": None} if null else {}
    return [
        pair([user("weather?")], [call("weather", city="Rome")], [assistant("no")])
        | {
            "tools": [tool("weather", city={"type": "string"})],
            "chat_template_kwargs": {"options": {"deep": {"a": 1}}},
        },
        pair([user("add")], [call("add", a=1.5399356229, b=[None, 2])], [call("add", a=1.25, **more)])
        | {"tools": [tool("add", a={"type": "number"})], "chat_template_kwargs": {"options": {"deep": {"b": 2}}}},
    ]


@pytest.mark.parametrize("source", ["jsonl", "jsonl with a null", "json", "parquet", "list"])
def test_tokenize_pairs_tools_are_written_as_in_the_file(tmp_path, monkeypatch, tokenizer, source):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer.chat_template = AS_JSON
    records = records_with_tools(null=source == "jsonl with a null")
    path = tmp_path / f"a.{source.split()[0]}"
    if source == "parquet":
        Dataset.from_list(records).to_parquet(path)
    elif source == "json":
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_text("\n".join(map(json.dumps, records)))
    dataset = Dataset.from_list(records) if source == "list" else load_records(str(path))
    for record, row in zip(records, tokenize_pairs(dataset, tokenizer), strict=True):
        options = {"tools": record["tools"], **record["chat_template_kwargs"], "tokenize": False}
        for side in ("chosen", "rejected"):
            by_hand = tokenizer.apply_chat_template(record["prompt"] + record[side], **options)
            assert tokenizer.decode(row["prompt_ids"] + row[f"{side}_ids"]) == by_hand


CALLS = {"role": "assistant", "content": None}


@pytest.mark.parametrize(
    ("feature", "value", "expected"),
    [
        ({"a": Value("string"), "b": Value("string")}, {"a": None, "b": "x"}, {"b": "x"}),
        (List({"a": {"b": Value("int64")}, "c": Value("bool")}), [{"a": {"b": None}, "c": None}], [{"a": {}}]),
        (List(Value("int64")), [1, None], [1, None]),  # an item of a list was written
        (List({"a": Value("int64")}), [None, {"a": None}], [None, {}]),
        (Json(), '{"a": null, "b": 1.5399356229}', {"a": None, "b": 1.5399356229}),
        ({"a": List(Json())}, {"a": ['{"b": null}', None]}, {"a": [{"b": None}, None]}),
        (Value("string"), None, None),
        # a message that calls tools says nothing else
        (dict.fromkeys(("role", "content", "name"), Value("string")), CALLS | {"name": None}, CALLS),
    ],
)
def test_as_written_leaves_out_what_arrow_fills_in(feature, value, expected):
    Features({"column": feature})  # such features there are
    assert as_written(value, feature) == expected


def test_load_problems_prompts_are_written_as_in_the_file(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer.chat_template = AS_JSON
    records = records_with_tools(null=False)
    Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    for record, problem in zip(records, load_problems(str(tmp_path / "a.parquet")), strict=True):
        options = {"tools": record["tools"], **record["chat_template_kwargs"], "tokenize": False}
        by_hand = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, **options)
        assert chat_prompt(problem.prompt, problem.record, tokenizer) == by_hand


# ---- contents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "content", "written"),
    [
        (FOR_STRINGS, parts("Look: ", "a tree"), "user:Look: a tree;"),
        (ADDS_STRINGS, parts("Look: ", "a tree"), "user:Look: a tree;"),
        (FOR_STRINGS, ["Look: ", "a tree"], "user:Look: a tree;"),
        (FOR_BOTH, parts("Look: ", "a tree"), "user:<Look: ><a tree>;"),
        (FOR_BOTH, "a tree", "user:a tree;"),
        (FOR_PARTS, parts("Look: ", "a tree"), "user:Look: |a tree|;"),
        (FOR_PARTS, "a tree", "user:a tree|;"),
    ],
)
def test_from_messages_gives_contents_in_the_form_of_the_template(tokenizer, template, content, written):
    tokenizer.chat_template = template
    prompt, chosen, rejected = from_messages(pair([user(content)], [assistant("a")], [assistant("b")]), tokenizer)
    end = "|;" if template is FOR_PARTS else ";"
    assert (prompt, chosen, rejected) == (written + "assistant:", "a" + end, "b" + end)
    assert chat_prompt([user(content)], {}, tokenizer) == prompt


def test_from_messages_mixes_strings_and_parts(tokenizer):
    tokenizer.chat_template = FOR_PARTS
    texts = from_messages(
        pair([user("a"), user(parts("b", "c"))], [assistant(parts("d"))], [assistant("e")]), tokenizer
    )
    assert texts == ("user:a|;user:b|c|;assistant:", "d|;", "e|;")


@pytest.mark.parametrize(
    "part", [{"type": "image"}, {"type": "image_url", "image_url": {"url": "a"}}, {"type": "video"}]
)
def test_from_messages_refuses_parts_that_are_no_text(tokenizer, part):
    record = pair([user([part, *parts("what is it?")])], [assistant("a")], [assistant("b")])
    with pytest.raises(BadRecord, match=f"a part of the type '{part['type']}'; this trainer is for text"):
        from_messages(record, tokenizer)


KNOWS_TWO_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\n{% elif m.role == 'assistant' %}"
    "A:{{ m.content.split('</think>')[-1] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def test_from_messages_names_a_role_that_the_template_leaves_out(tokenizer):
    tokenizer.chat_template = KNOWS_TWO_ROLES
    answers = [assistant("a")], [assistant("b")]
    assert from_messages(pair([user("A: a?")], *answers), tokenizer) == ("U:A: a?\nA:", "a\n", "b\n")
    for role in ("User", "system"):
        prompt = [{"role": role, "content": "A"}, user("A: a?")]  # "A" is in the text, but not by this message
        with pytest.raises(BadRecord, match=f"leaves out messages of the role '{role}': rename"):
            from_messages(pair(prompt, *answers), tokenizer)


def test_from_messages_a_template_may_shorten_a_content(tokenizer):
    tokenizer.chat_template = KNOWS_TWO_ROLES
    shortened = [user("x"), assistant("<think>y</think>z"), user("w")]
    texts = from_messages(pair(shortened, [assistant("a")], [call("f")]) | {"rejected": [assistant("b")]}, tokenizer)
    assert texts == ("U:x\nA:z\nU:w\nA:", "a\n", "b\n")


@pytest.mark.parametrize("fault", ["{{ 1 / 0 }}", "{{ [1] * 10**20 }}", "{{ messages[0].content.nothing.more }}"])
def test_from_messages_a_template_that_raises_makes_a_bad_record(tokenizer, fault):
    tokenizer.chat_template = CHATML + fault
    with pytest.raises(BadRecord, match="the chat template refuses the messages or tools"):
        from_messages(pair([user("x")], [assistant("a")], [assistant("b")]), tokenizer)


# ---- messages -------------------------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "be short"}


@pytest.mark.parametrize(
    ("prompt", "repeated"),
    [
        ([user("x")], [user("x")]),
        ([SYSTEM, user("x"), assistant("y"), user("z")], [SYSTEM, user("x"), assistant("y"), user("z")]),
        ([SYSTEM, user("x")], [user("x")]),
        ([user("x"), assistant("y"), user("x")], [user("x")]),
    ],
)
def test_from_messages_strips_a_repeated_prompt(tokenizer, prompt, repeated):
    chosen, rejected = [assistant("a"), user("more"), assistant("b")], [assistant("c")]
    texts = from_messages(pair(prompt, repeated + chosen, repeated + rejected), tokenizer)
    assert texts == from_messages(pair(prompt, chosen, rejected), tokenizer)
    assert texts[1].startswith("a<|im_end|>\n<|im_start|>user\nmore") and texts[2] == "c<|im_end|>\n"


@pytest.mark.parametrize("prefix", [[user("x")], [user("another")], [SYSTEM]])
def test_from_messages_refuses_a_completion_that_asks(tokenizer, prefix):
    """It repeats the prompt on one side only, or is no answer."""
    tokenizer.chat_template = FOR_STRINGS.removesuffix(GENERATION)  # such a template would take it
    record = pair([user("x")], [*prefix, assistant("a")], [assistant("b")])
    with pytest.raises(BadRecord, match=f"begins with a message of the role '{prefix[0]['role']}'"):
        from_messages(record, tokenizer)


def test_from_messages_takes_a_single_message(tokenizer):
    texts = from_messages(pair(user("x"), assistant("a"), assistant("b")), tokenizer)
    assert texts == from_messages(pair([user("x")], [assistant("a")], [assistant("b")]), tokenizer)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("a", "chosen is a string, not a list of messages"),
        (["a", "b"], "chosen is a list of strings, not a list of messages"),
        ({"role": ["assistant"], "content": ["a"]}, "chosen is an object, not a list of messages"),
        ([{"from": "gpt", "value": "a"}], r"a message of chosen has no role \(it has from, value\)"),
        ([{"role": "assistant"}], "a message of chosen has no content"),
        ([{"role": "assistant", "content": 5}], "a message of chosen has a number as its content"),
        ([{"role": "assistant", "content": [5]}], "a part that is a number"),
        ([{"role": "Assistant", "content": "a"}], "before an answer of the role 'Assistant'"),
    ],
)
def test_from_messages_says_what_is_wrong(tokenizer, chosen, message):
    with pytest.raises(BadRecord, match=message):
        from_messages(pair([user("x")], chosen, [assistant("b")]), tokenizer)


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
@pytest.mark.parametrize("value", ["{oops", 5, ["oops"]])
def test_from_messages_refuses_tools_and_options_of_other_types(tokenizer, column, value):
    record = pair([user("x")], [assistant("a")], [assistant("b")]) | {column: value}
    with pytest.raises(BadRecord, match="the chat template refuses the messages or tools"):
        from_messages(record, tokenizer)


# ---- strings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"chosen": "yes", "rejected": "no"},
            "no column prompt, and chosen and rejected begin with nothing in common$",
        ),
        (
            {"instruction": "a?", "id": 3, "chosen": "yes", "rejected": "no"},
            r"nothing in common \(the other columns are instruction, id: rename the one with the prompt\)",
        ),
        (pair("x", 5, "b"), "chosen is a number, not a string"),
        (pair(float("nan"), "a", "b"), "prompt is a number, not a string"),
        (pair([user("x")], "a", "b"), "prompt is a list of objects, not a string"),
        (pair("x", ["a"], ["b"]), "chosen is a list of strings, not a string"),
        (pair("x", '[{"role": "assistant", "content": "a"}]', "b"), "chosen is a string that spells out messages"),
        (pair("[{'content': 'a', 'role': 'user'}]", "a", "b"), "prompt is a string that spells out messages"),
    ],
)
def test_from_strings_says_what_is_wrong(record, message):
    with pytest.raises(BadRecord, match=message):
        from_strings(record)


def test_from_strings_takes_a_completion_that_is_json():
    record = pair("x", '[{"name": "a", "role": "admin"}]', '[{"n": 1}]')
    assert from_strings(record) == tuple(record.values())


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: sky?\nA: blue", "Q: sky?\nA: green", "Q: sky?\nA:"),  # before the space of the next word
        ("Q: sky?\nblue", "Q: sky?\ngreen", "Q: sky?\n"),  # after a line break
        ("Q: 2 + 2 = 14", "Q: 2 + 2 = 15", "Q: 2 + 2 ="),  # not in the middle of a number
        ("Q: ok? yes", "Q: ok? yes indeed", "Q: ok?"),  # one is the start of the other
        ("Q: ok? yes", "Q: ok? yes", "Q: ok?"),
        ("Q:  a", "Q:  b", "Q: "),
        ("天空是蓝色", "天空是绿色", "天空是"),  # no spaces: where they differ
        ("", "no", ""),
    ],
)
def test_from_strings_splits_an_implicit_prompt_where_a_token_ends(chosen, rejected, prompt):
    texts = from_strings({"chosen": chosen, "rejected": rejected})
    assert texts == (prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt))


def test_from_strings_keeps_a_given_prompt():
    assert from_strings({"prompt": "Q", "chosen": "a b", "rejected": "a c"}) == ("Q", "a b", "a c")
    with pytest.raises(BadRecord, match="prompt is missing"):
        from_strings({"prompt": None, "chosen": "a", "rejected": "b"})
