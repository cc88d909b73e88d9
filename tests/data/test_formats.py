"""What the loss counts: exactly completions, assistant turns and texts, each with one eos in the end."""

import pytest

from vlora_jax.data.chat import chat_documents
from vlora_jax.data.config import DatasetConfig
from vlora_jax.data.formats import completion_documents, text_documents
from vlora_jax.data.table import read
from vlora_jax.data.tokens import decode, eos_id, load_tokenizer, pieces, specials
from vlora_jax.errors import DataError

QA = [
    {"question": "how many?", "answer": "24 of them"},
    {"question": "über — 日本語?", "answer": "hello\nworld 🙂"},
    {"question": "empty", "answer": ""},
]
TALK = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "how many?"},
    {"role": "assistant", "content": "24 of them"},
    {"role": "user", "content": "hello\nassistant"},
    {"role": "assistant", "content": "world"},
]


def documents(reader, source, path, format, **options):
    """Decoded runs of each document: of what the loss counts, and of the rest."""
    tokenizer = load_tokenizer(source)
    config = DatasetConfig(path=path, format=format, **options)
    found = reader(config, read(path, None, "train"), tokenizer)
    return tokenizer, found, [pieces(tokenizer, *found[index]) for index in range(len(found))]


def learnt(runs):
    return ["".join(text for text, flag in each if flag) for each in runs]


def whole(runs):
    return ["".join(text for text, _ in each) for each in runs]


@pytest.mark.parametrize("bos", [None, "<s>"])
@pytest.mark.parametrize("template", ["{question} ", "Question: {question}\nAnswer: ", "{question}"])
def test_exactly_the_completion_and_one_eos_are_learnt(make_tokenizer, write, bos, template):
    """Also where the tokenizer would join the prompt's last letter and the completion's first in one token."""
    source = make_tokenizer(bos=bos)
    options = {"prompt_template": template, "completion_template": "{answer}"}
    tokenizer, found, runs = documents(completion_documents, source, write("qa.jsonl", QA), "completion", **options)
    assert learnt(runs) == [row["answer"] + "</s>" for row in QA]
    prompts = [template.format(**row) for row in QA]
    assert whole(runs) == [
        (bos or "") + prompt + row["answer"] + "</s>" for prompt, row in zip(prompts, QA, strict=True)
    ]
    for index, prompt in enumerate(prompts):
        tokens, supervised = found[index]
        assert tokens[~supervised].tolist() == tokenizer(prompt)["input_ids"], "as it will be asked later"
        assert (tokens == tokenizer.eos_token_id).sum() == 1
        assert supervised[-1]


def test_all_tokens_can_be_learnt(tokenizer, write):
    _, _, runs = documents(completion_documents, tokenizer, write("qa.jsonl", QA), "completion", loss="all")
    assert learnt(runs) == whole(runs) == [row["question"] + row["answer"] + "</s>" for row in QA]


def test_an_eos_that_is_there_already_is_not_doubled(tokenizer, write):
    path = write("qa.jsonl", [{"prompt": "a", "completion": "b</s>"}])
    _, _, runs = documents(completion_documents, tokenizer, path, "completion")
    assert learnt(runs) == ["b</s>"]
    path = write("text.jsonl", [{"text": "b</s>"}, {"text": "c"}])
    assert learnt(documents(text_documents, tokenizer, path, "text")[2]) == ["b</s>", "c</s>"]


def test_texts_are_learnt_whole_but_for_what_the_tokenizer_puts_first(make_tokenizer, write):
    path = write("text.jsonl", [{"text": "hello world"}, {"text": " \n"}, {"text": "ü"}])
    _, found, runs = documents(text_documents, make_tokenizer(bos="<s>"), path, "text")
    assert runs == [[("<s>", False), ("hello world</s>", True)], [("<s>", False), ("ü</s>", True)]]
    assert found.rows.tolist() == [0, 2]
    assert found.notes == ("1 empty rows left out",)


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_exactly_the_assistants_turns_are_learnt(make_tokenizer, write, bos):
    path = write("chat.jsonl", [{"messages": TALK}, {"messages": TALK[:3]}])
    tokenizer, found, runs = documents(chat_documents, make_tokenizer(bos=bos), path, "chat")
    assert [text for text, flag in runs[0] if flag] == ["24 of them<|end|>\n", "world<|end|>\n</s>"]
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert whole(runs)[0] == rendered + "</s>", "the template ends turns by a token that this tokenizer has not as eos"
    assert found[0][0].tolist()[:-1] == tokenizer.apply_chat_template(TALK)["input_ids"]


def test_the_templates_own_end_of_turn_is_the_eos(make_tokenizer, write):
    path = write("chat.jsonl", [{"messages": TALK}])
    _, _, runs = documents(chat_documents, make_tokenizer(eos="<|end|>"), path, "chat")
    assert learnt(runs) == ["24 of them<|end|>\nworld<|end|>\n"]


def test_a_template_that_marks_answers_is_believed(make_tokenizer, write):
    marked = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    )
    path = write("chat.jsonl", [{"messages": TALK}, {"messages": TALK[2:]}])
    source = make_tokenizer(eos="<|end|>", template=marked)
    tokenizer, found, runs = documents(chat_documents, source, path, "chat")
    assert [text for text, flag in runs[0] if flag] == ["24 of them<|end|>", "world<|end|>"]
    assert learnt(runs)[1] == learnt(runs)[0], "a conversation may begin with the assistant here"
    own = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert found[0][0].tolist() == own["input_ids"]
    assert found[0][1].tolist() == [bool(flag) for flag in own["assistant_masks"]]


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer, write):
    """As Qwen3's does with its thoughts: the assistant's tokens in the whole text cannot be told by prefixes."""
    rewriting = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>"
        "{% endif %}{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    source = make_tokenizer(template=rewriting)
    one = write("one.jsonl", [{"messages": TALK[:3]}])
    assert learnt(documents(chat_documents, source, one, "chat")[2]) == ["<think></think>24 of them<|end|>\n</s>"]
    two = write("two.jsonl", [{"messages": TALK}])
    with pytest.raises(
        DataError, match=r"row 1: the chat template writes the turns up to 3 in another way.*generation"
    ):
        documents(chat_documents, source, two, "chat")
    runs = documents(chat_documents, source, two, "chat", loss="all")[2]
    assert learnt(runs) == whole(runs), "all tokens need no mask"


def test_a_template_comes_from_a_file_too(make_tokenizer, write, tmp_path):
    path = write("chat.jsonl", [{"messages": TALK[1:3]}])
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
    )
    source = make_tokenizer(template=None)
    _, _, runs = documents(chat_documents, source, path, "chat", chat_template=str(tmp_path / "t.jinja"))
    assert runs == [[("[user]how many?[assistant]", False), ("24 of them</s>", True)]]
    with pytest.raises(DataError, match=r"no chat template; give a Jinja file by data\.chat_template"):
        documents(chat_documents, source, path, "chat")
    with pytest.raises(DataError, match=r"chat_template nowhere cannot be read"):
        documents(chat_documents, source, path, "chat", chat_template="nowhere")


def test_sharegpt_turns_are_conversations_too(tokenizer, write):
    path = write("chat.jsonl", [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}])
    assert learnt(documents(chat_documents, tokenizer, path, "chat")[2]) == ["b<|end|>\n</s>"]


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        ("hello", "row 2: a conversation is a list of turns, not 'hello'"),
        ([], "row 2: a conversation is a list of turns"),
        (None, "row 2: a conversation is a list of turns, not 'None'"),
        ([{"content": "a"}], "row 2: turn 1 has no role"),
        ([{"role": "user", "content": 3}], "row 2: the content of turn 1 is no text"),
        ([{"role": "assistant", "content": "a"}], "row 2: begins with the assistant's turn"),
    ],
)
def test_what_is_no_conversation_is_refused(tokenizer, write, turns, match):
    path = write("chat.jsonl", [{"messages": TALK}, {"messages": turns}])
    with pytest.raises(DataError, match=match):
        documents(chat_documents, tokenizer, path, "chat")


def test_a_template_that_refuses_says_which_row(make_tokenizer, write):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system\\nrole') }}{% endif %}"
    path = write("chat.jsonl", [{"messages": TALK}])
    with pytest.raises(DataError, match="row 1: the chat template refuses it: no system role"):
        documents(chat_documents, make_tokenizer(template=template), path, "chat")


@pytest.mark.parametrize("value", [None, 3, ["a"], 2.5])
def test_a_value_that_is_no_text_is_refused_by_its_row(tokenizer, write, value):
    path = write("qa.jsonl", [*QA, {"question": "a", "answer": value}])
    with pytest.raises(DataError, match=r"qa.jsonl, row 4: answer is .*not text"):
        documents(completion_documents, tokenizer, path, "completion")


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{questoin}", "no column 'questoin'; nearest: 'question'"),
        ("{question.__class__}", "is no column name"),
        ("{}", "is no column name"),
        ("{question", "expected '}'"),
    ],
)
def test_templates_name_columns_and_do_nothing_else(tokenizer, write, template, match):
    options = {"prompt_template": template, "completion_template": "{answer}"}
    with pytest.raises(DataError, match=match):
        documents(completion_documents, tokenizer, write("qa.jsonl", QA), "completion", **options)


def test_the_end_is_a_token_that_there_is(make_tokenizer):
    without = load_tokenizer(make_tokenizer(eos=None, pad=None))
    with pytest.raises(DataError, match=r"no eos token.*data\.eos"):
        eos_id(without, None)
    assert decode(without, [eos_id(without, "<|end|>")]) == "<|end|>"
    with pytest.raises(DataError, match=r"'<stop>' is no token"):
        eos_id(without, "<stop>")


def test_what_stands_around_a_text_is_the_tokenizers(make_tokenizer):
    assert specials(load_tokenizer(make_tokenizer())) == ([], [])
    tokenizer = load_tokenizer(make_tokenizer(bos="<s>"))
    assert specials(tokenizer) == ([tokenizer.bos_token_id], [])


def test_a_tokenizer_that_is_not_there_is_told_in_one_line(tmp_path, monkeypatch, unchecked):
    from vlora_jax.data import network

    monkeypatch.setattr(network, "reachable", lambda endpoint: False)
    for source, match in ((str(tmp_path), "is a directory, but"), ("nobody/nothing", "is no directory here")):
        with pytest.raises(DataError, match=match) as caught:
            load_tokenizer(source)
        assert "\n" not in str(caught.value)
