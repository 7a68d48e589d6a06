"""Chat templates and tokenizers that fail, take too much, or are not what their names say."""

import importlib.util
import json
import shutil
import sys
import threading
from datetime import datetime

import pytest
from templates import ASK, CHATML, TELL, WHERE, assistant, chatml, encode, encode_side, user

from alignjax.data import chat, foreign
from alignjax.data.columns import Side
from alignjax.errors import UserError


def with_template(template: str):
    tokenizer = chatml()
    tokenizer.chat_template = template
    return tokenizer


def test_variables_of_a_row_reach_the_template():
    deep = "{% if add_generation_prompt and deep %}{{ '<think>' }}{% endif %}"
    tokenizer = with_template(CHATML + deep)
    text = chat.render(tokenizer, [ASK], True, variables={"deep": True})
    assert text == chat.render(tokenizer, [ASK], True) + "<think>"
    tokenizer.chat_template = "{{ tone }}" + CHATML
    ids, mask = encode_side(tokenizer, Side([ASK], [TELL], template_kwargs={"tone": "kind"}))
    assert tokenizer.decode(ids).startswith("kind<|im_start|>user")
    plain, plain_mask = encode(tokenizer, [ASK, TELL], prompt=1)
    assert (sum(mask), ids[-len(plain) :]) == (sum(plain_mask), plain)
    with pytest.raises(UserError, match=f"^{WHERE}: .*template"):
        encode_side(tokenizer, Side([ASK], [TELL], template_kwargs={"chat_template": "x"}))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}",
        "{% for m in messages %}{{ m['content'] }",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% for i in range(10**12) %}x{% endfor %}",
        "{{ 10**(10**10) }}",
        "{{ messages.none.at.all }}",
        "{{ strftime_now(5) }}",
    ],
)
def test_a_template_that_fails_refuses_the_row_and_is_no_probe(template):
    tokenizer = with_template(template + CHATML)
    tokenizer.started = datetime(2026, 1, 31)
    with pytest.raises(UserError, match=f"^{WHERE}: .* refuses this row .*--model.chat_template"):
        encode(tokenizer, [ASK, TELL])
    assert chat.end_of_turn_id(tokenizer) is None


LOOPS = "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% set r = range(99999) %}" + LOOPS,
        "{{ 'x' * 10**12 }}",
        "{{ '%999999999999d' % 1 }}",
        "{% set x = namespace(x='x' * 9999) %}{% for i in range(99) %}{% set x.x = x.x ~ x.x %}"
        "{% endfor %}",
    ],
)
def test_a_template_that_takes_too_much_ends_whatever_is_asked_of_it(template, monkeypatch):
    monkeypatch.setattr(foreign, "SECONDS", 0.5)
    tokenizer = with_template(template + CHATML)
    for ask in (lambda: encode(tokenizer, [ASK, TELL]), lambda: chat.end_of_turn_id(tokenizer)):
        with pytest.raises(UserError, match="takes more than .*--model.chat_template"):
            ask()
    assert (
        chat.render(chatml(), [ASK])
        == "<|im_start|>user\nWhat is the colour of the sky?<|im_end|>\n"
    )


def test_a_thread_renders_as_well():
    made = []
    thread = threading.Thread(target=lambda: made.append(chat.render(chatml(), [ASK])))
    thread.start()
    thread.join()
    assert made == [chat.render(chatml(), [ASK])]


@pytest.mark.parametrize("role", ["system", ""])
def test_the_end_of_a_turn_is_known_of_templates_that_want_a_system_turn(role):
    demands = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = with_template((demands if role else "") + CHATML)
    assert chat.end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_of_several_templates_the_default_is_taken(tokenizer_dir, tmp_path):
    shutil.copytree(tokenizer_dir, tmp_path / "model")
    (tmp_path / "model/additional_chat_templates").mkdir()
    (tmp_path / "model/additional_chat_templates/tools.jinja").write_text("{{ 'tools' }}")
    tokenizer = chat.load_tokenizer(tmp_path / "model")
    assert chat.render(tokenizer, [ASK]).startswith("<|im_start|>user")
    (tmp_path / "model/chat_template.jinja").rename(
        tmp_path / "model/additional_chat_templates/other.jinja"
    )
    tokenizer = chat.load_tokenizer(tmp_path / "model")
    with pytest.raises(UserError, match=r"none is the default.*'tools'.*--model.chat_template"):
        encode(tokenizer, [ASK, TELL])
    assert chat.end_of_turn_id(tokenizer) is None


# A prompt or an earlier answer that the template renders otherwise

THINKS = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
DROPS = CHATML.replace("+ m['content']", "+ ('<think>' if loop.last else '') + m['content']")


def test_a_generation_prompt_that_no_answer_follows_is_told():
    for messages in ([ASK, TELL], [ASK, TELL, ASK, TELL]):
        with pytest.raises(UserError) as caught:
            encode(with_template(THINKS), messages, train_on="last")
        assert f"generation prompt for turn {len(messages)} is not" in str(caught.value)
        assert "train_on" not in str(caught.value)


def test_everything_is_trained_where_no_turn_can_be_told_apart():
    for template in (THINKS, DROPS):
        tokenizer = with_template(template)
        ids, mask = encode(tokenizer, [ASK, TELL, ASK, TELL], train_on="everything")
        text = chat.render(tokenizer, [ASK, TELL, ASK, TELL])
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        assert all(mask)


# The date


def test_a_template_writes_the_date_that_the_tokenizer_was_given(tokenizer_dir, tmp_path):
    file = tmp_path / "t.jinja"
    for template, dates in (
        ("{{ strftime_now('%d %b %Y') }}", ["31 Jan 2026"]),
        ('{% if strftime_now is defined %}{{ strftime_now("%Y") }}{% endif %}', ["2026"]),
        ("{% set f = '%H' %}{{ strftime_now(f) }}", ["2026-01-31T23:59:00"]),
        ("{{ 'no date' }}", []),
    ):
        file.write_text(template)
        tokenizer = chat.load_tokenizer(tokenizer_dir, str(file), datetime(2026, 1, 31, 23, 59))
        assert [date for date in chat.dates_of(tokenizer) if date] == dates
        shown = {"2026-01-31T23:59:00": "23"}
        assert chat.render(tokenizer, [ASK]) == "".join(
            shown.get(one, one) for one in dates or ["no date"]
        )


# Tokenizers


def stored(directory, **changes):
    content = json.loads((directory / "tokenizer.json").read_text()) | changes
    (directory / "tokenizer.json").write_text(json.dumps(content))


BPE = {"type": "BPE", "vocab": {"a": 2**31 + 5, "<|endoftext|>": 0}, "merges": []}
SPLIT = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", {"pre_tokenizer": {"type": "Newer"}}),
        ("tokenizer.json", {"model": {"type": "Newer", "vocab": {}}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}}}),
        ("tokenizer.json", {"model": BPE}),
        ("tokenizer.json", {"model": BPE | {"vocab": {"a": 0}, "merges": [["qq", "zz"]]}}),
        ("tokenizer.json", None),
        ("tokenizer_config.json", {"eos_token": 2}),
        ("tokenizer_config.json", {"tokenizer_class": ["X"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 5}}),
        ("tokenizer_config.json", {"chat_template": 5}),
        ("tokenizer_config.json", None),
    ],
)
def test_a_tokenizer_that_does_not_load(tokenizer_dir, tmp_path, capfd, file, change):
    model = shutil.copytree(tokenizer_dir, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    content = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({**content, **change} if change else []))
    with pytest.raises(UserError, match=f"^{model}: ") as caught:
        chat.load_tokenizer(model)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_text_on_which_a_tokenizer_panics_is_a_bad_row(tokenizer_dir, tmp_path, capfd):
    model = shutil.copytree(tokenizer_dir, tmp_path / "model")
    before = json.loads((model / "tokenizer.json").read_text())["pre_tokenizer"]
    stored(model, pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, before]})
    tokenizer = chat.load_tokenizer(model)
    sides = [(Side([user(text)], [TELL]), text) for text in ("a", "x" * 40, "b")]
    first, bad, last = chat.encode_sides(tokenizer, sides, "all")
    assert str(bad).startswith(f"{'x' * 40}: the tokenizer fails on its text (")
    assert first[0].dtype == last[0].dtype == "int32"
    assert capfd.readouterr().err == ""


def test_a_text_too_long_for_memory_is_refused_and_others_are_divided(monkeypatch):
    tokenizer = chatml()
    texts = ["because"] * 5 + ["so it is"]
    sides = [(Side([ASK], [assistant(text)]), WHERE) for text in texts]
    whole = chat.encode_sides(tokenizer, sides, "all")
    monkeypatch.setattr(chat, "_LONGEST", 130)
    for one, other in zip(whole, chat.encode_sides(tokenizer, sides, "all"), strict=True):
        assert [part.tolist() for part in one] == [part.tolist() for part in other]
    [bad] = chat.encode_sides(tokenizer, [(Side([user("p" * 131)], [TELL]), WHERE)], "all")
    assert str(bad).startswith(f"{WHERE}: the text has ")


def test_sentencepiece_is_named_where_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: name != "sentencepiece" and find(name, *a)
    )
    with pytest.raises(UserError, match=f"^{tmp_path}: .*pip install sentencepiece"):
        chat.load_tokenizer(tmp_path)
