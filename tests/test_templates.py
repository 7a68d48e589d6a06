"""The shipped chat templates: their text to the letter, and how one is chosen."""

from pathlib import Path

import pytest
from templates import ASK, ASK2, TELL, WHERE, assistant, encode, user, wrapped

from alignjax import templates
from alignjax.data import chat

SYSTEM = {"role": "system", "content": "Be brief."}
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
NAMES = ", ".join(templates.NEEDS)


def everything(*left_out: str, eos: str = "</s>"):
    """A small tokenizer with every control token that a template needs, but for some."""
    needed = {token for tokens in templates.NEEDS.values() for token in tokens} - {"eos"}
    special = ("<unk>", "<s>", "</s>", *sorted(needed - set(left_out)))
    return wrapped(special, "", bos="<s>", **({"eos_token": eos} if eos else {}))


def with_template(tokenizer, name: str):
    tokenizer.chat_template = templates.choose(tokenizer, name)
    return tokenizer


# Text

TURNS = [user(" one\n"), assistant(" two "), user("three"), assistant("four")]
RENDERED = {  # without and with a system turn, and then what a further user turn's answer follows
    "chatml": (
        "<|im_start|>user\n one\n<|im_end|>\n<|im_start|>assistant\n two <|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n one\n<|im_end|>\n"
        "<|im_start|>assistant\n two <|im_end|>\n<|im_start|>user\nthree<|im_end|>\n"
        "<|im_start|>assistant\nfour<|im_end|>\n",
        "<|im_start|>user\nfive<|im_end|>\n<|im_start|>assistant\n",
    ),
    "gemma": (
        "<s><start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\ntwo<end_of_turn>\n"
        "<start_of_turn>user\nthree<end_of_turn>\n<start_of_turn>model\nfour<end_of_turn>\n",
        "<s><start_of_turn>user\nBe brief.\n\none<end_of_turn>\n<start_of_turn>model\n"
        "two<end_of_turn>\n<start_of_turn>user\nthree<end_of_turn>\n<start_of_turn>model\n"
        "four<end_of_turn>\n",
        "<start_of_turn>user\nfive<end_of_turn>\n<start_of_turn>model\n",
    ),
    "llama2": (
        "<s>[INST] one [/INST] two </s><s>[INST] three [/INST] four </s>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n one [/INST] two </s><s>[INST] three [/INST] "
        "four </s>",
        "<s>[INST] five [/INST]",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nthree<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nfour<|eot_id|>",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nthree<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nfour<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nfive<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (
        "<s> [INST]  one\n [/INST]  two </s> [INST] three [/INST] four</s>",
        "<s> [INST] Be brief.\n\n one\n [/INST]  two </s> [INST] three [/INST] four</s>",
        " [INST] five [/INST]",
    ),
    "mistral-v3": (
        "<s>[INST]  one\n[/INST]  two </s>[INST] three[/INST] four</s>",
        "<s>[INST] Be brief.\n\n one\n[/INST]  two </s>[INST] three[/INST] four</s>",
        "[INST] five[/INST]",
    ),
    "mistral-v3-tekken": (
        "<s>[INST] one\n[/INST] two </s>[INST]three[/INST]four</s>",
        "<s>[INST]Be brief.\n\n one\n[/INST] two </s>[INST]three[/INST]four</s>",
        "[INST]five[/INST]",
    ),
    "mistral-v7": (
        "<s>[INST]  one\n[/INST]  two </s>[INST] three[/INST] four</s>",
        "<s>[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST]  one\n[/INST]  two </s>"
        "[INST] three[/INST] four</s>",
        "[INST] five[/INST]",
    ),
    "tulu": (
        "<s><|user|>\n one\n\n<|assistant|>\n two </s>\n<|user|>\nthree\n<|assistant|>\nfour</s>\n",
        "<s><|system|>\nBe brief.\n<|user|>\n one\n\n<|assistant|>\n two </s>\n<|user|>\nthree\n"
        "<|assistant|>\nfour</s>\n",
        "<|user|>\nfive\n<|assistant|>\n",
    ),
    "vicuna": (
        f"<s>{VICUNA} USER:  one\n ASSISTANT:  two </s>USER: three ASSISTANT: four</s>",
        "<s>Be brief. USER:  one\n ASSISTANT:  two </s>USER: three ASSISTANT: four</s>",
        "USER: five ASSISTANT:",
    ),
    "zephyr": (
        "<s><|user|>\n one\n</s>\n<|assistant|>\n two </s>\n<|user|>\nthree</s>\n"
        "<|assistant|>\nfour</s>\n",
        "<s><|system|>\nBe brief.</s>\n<|user|>\n one\n</s>\n<|assistant|>\n two </s>\n"
        "<|user|>\nthree</s>\n<|assistant|>\nfour</s>\n",
        "<|user|>\nfive</s>\n<|assistant|>\n",
    ),
}


@pytest.mark.parametrize("name", templates.NEEDS)
def test_text_of(name):
    tokenizer = with_template(everything(), name)
    bare, system, further = RENDERED[name]
    assert chat.render(tokenizer, TURNS) == bare
    assert chat.render(tokenizer, [SYSTEM, *TURNS]) == system
    assert chat.render(tokenizer, [*TURNS, user("five")], generate=True) == bare + further


@pytest.mark.parametrize("name", ["gemma", "llama2", "mistral", "mistral-v3", "mistral-v3-tekken"])
@pytest.mark.parametrize("turns", [[ASK, ASK2], [TELL], [SYSTEM, TELL], [ASK, TELL, SYSTEM]])
def test_roles_that_do_not_alternate_are_refused(name, turns):
    tokenizer = with_template(everything(), name)
    with pytest.raises(ValueError) as caught:
        encode(tokenizer, [*turns, ASK, TELL])
    assert str(caught.value).startswith(
        f"{WHERE}: the chat template refuses this row (roles must alternate "
        "user/assistant/user/assistant); "
    )


@pytest.mark.parametrize(
    ("name", "role", "said"),
    [
        ("vicuna", "system", "behind a first system turn, only user and assistant turns are known"),
        ("mistral-v7", "tool", "only system, user and assistant turns are known"),
    ],
)
def test_a_role_that_a_template_does_not_know_is_refused(name, role, said):
    tokenizer = with_template(everything(), name)
    with pytest.raises(ValueError) as caught:
        encode(tokenizer, [ASK, TELL, {"role": role, "content": "no"}, TELL])
    assert str(caught.value).startswith(f"{WHERE}: the chat template refuses this row ({said}); ")


# Choosing


def test_a_name_a_file_and_neither(tmp_path, monkeypatch):
    everything().save_pretrained(tmp_path / "model")
    loaded = chat.load_tokenizer(tmp_path / "model", "zephyr")
    assert chat.render(loaded, TURNS) == RENDERED["zephyr"][0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zephyr").write_text("a file")  # a shipped name means the shipped template
    loaded = chat.load_tokenizer(tmp_path / "model", "zephyr")
    assert chat.render(loaded, TURNS) == RENDERED["zephyr"][0]
    loaded = chat.load_tokenizer(tmp_path / "model", "./zephyr")
    assert chat.render(loaded, TURNS) == "a file"
    with pytest.raises(ValueError) as caught:
        chat.load_tokenizer(tmp_path / "model", "zephir")
    assert str(caught.value) == (
        "model.chat_template=zephir: there is no such file, nor is it one of: chatml, gemma, "
        "llama2, llama3, mistral, mistral-v3, mistral-v3-tekken, mistral-v7, tulu, vicuna, zephyr."
    )


@pytest.mark.parametrize("name", templates.NEEDS)
def test_a_tokenizer_without_a_token_of_the_template_is_refused(name):
    for token in templates.NEEDS[name]:
        lacking = everything(eos="") if token == "eos" else everything(token)
        with pytest.raises(ValueError) as caught:
            templates.choose(lacking, name)
        lack = (
            "the tokenizer has no EOS token, which ends an answer"
            if token == "eos"
            else f"{token} is no token of the model's tokenizer"
        )
        assert str(caught.value) == (
            f"model.chat_template={name}: {lack}; name another of: {NAMES}."
        )


def test_every_file_is_listed_and_has_its_text_here():
    files = {file.stem for file in Path(templates.__file__).parent.glob("*.jinja")}
    assert files == set(templates.NEEDS) == set(RENDERED)
