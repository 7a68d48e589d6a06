"""The shipped chat templates under the tokenizers of real models, against the models' own code.

Needs the extra `parity`; nothing is fetched.
"""

import pytest
from realtokenizers import MAKERS, package
from templates import ASK, ASK2, TELL, TELL2, assistant, encode, user

from alignjax import templates
from alignjax.data import chat

# Converters of transformers warn.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SYSTEM = {"role": "system", "content": "Be brief."}
PLAIN = ["llama2", "mistral", "tulu", "vicuna", "zephyr"]  # nothing but BOS and EOS is special
PAIRS = [(name, tokenizer) for name in PLAIN for tokenizer in MAKERS] + [
    ("chatml", "smollm2"),
    ("gemma", "gemma3"),
    ("llama3", "llama3"),
    ("mistral-v3", "mistral-v2"),
    ("mistral-v3", "mistral-v3"),
    ("mistral-v3", "mistral-v7"),
    ("mistral-v3-tekken", "tekken-v3"),
    ("mistral-v7", "mistral-v7"),
]
EVERY, ANSWERS = ("system", "user", "assistant"), ("assistant",)
# What stands before an answer, whether it is stripped, what ends it, and whose turns end so.
AROUND = {
    "chatml": ("", False, "<|im_end|>", EVERY),
    "gemma": ("", True, "<end_of_turn>", ("user", "assistant")),
    "llama2": (" ", True, " eos", ANSWERS),
    "llama3": ("", True, "<|eot_id|>", EVERY),
    "mistral": (" ", False, "eos", ANSWERS),
    "mistral-v3": (" ", False, "eos", ANSWERS),
    "mistral-v3-tekken": ("", False, "eos", ANSWERS),
    "mistral-v7": (" ", False, "eos", ANSWERS),
    "tulu": ("", False, "eos", ANSWERS),
    "vicuna": (" ", False, "eos", ANSWERS),
    "zephyr": ("", False, "eos", EVERY),
}
CHATS = {
    "one answer": [ASK, TELL],
    "two answers": [ASK, TELL, ASK2, TELL2],
    "a system turn": [SYSTEM, ASK, TELL, ASK2, TELL2],
    "spaces": [user("  Why?\n\n"), assistant(" Yes,  and "), user(" "), assistant(" no\n")],
    "characters": [
        user("東京 👩‍🚀 e\u0301 ﬁ ½"),
        assistant("né\u00a0à Zürich 🐝\tпривет\n\n\n\nשלום ﷽"),
        user("1234567.89 __init__"),
        assistant("🐝"),
    ],
    "repeated": [user("Yes"), assistant("Yes"), user("Yes"), assistant("Yes")],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Loads one of the real tokenizers, once; each call forgets the template of the one before."""
    loaded = {}

    def load(name: str):
        if name not in loaded:
            directory = tmp_path_factory.mktemp(name)
            MAKERS[name](directory)
            loaded[name] = chat.load_tokenizer(directory)
        loaded[name].chat_template = None
        return loaded[name]

    return load


def trained_text(tokenizer, ids: list[int], mask: list[bool]) -> list[str]:
    """The text of each unbroken run of trained tokens, as it stands behind all before it."""

    def text(end: int) -> str:
        return tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)

    edges = [i for i in range(1, len(ids) + 1) if mask[i - 1] != (i < len(ids) and mask[i])]
    assert not mask[0] and len(edges) % 2 == 0
    found = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        assert text(end).startswith(text(start))
        found.append(text(end).removeprefix(text(start)))
    return found


def chosen(made, name: str, model: str):
    tokenizer = made(model)
    tokenizer.chat_template = templates.choose(tokenizer, name)
    return tokenizer


@pytest.mark.parametrize("chat_name", CHATS)
@pytest.mark.parametrize(("name", "model"), PAIRS)
def test_ids_are_those_of_transformers_and_answers_are_trained(made, name, model, chat_name):
    tokenizer, messages = chosen(made, name, model), CHATS[chat_name]
    before, strips, end, roles = AROUND[name]
    end = end.replace("eos", tokenizer.eos_token)
    ids, mask = encode(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    assert trained_text(tokenizer, ids, mask) == [
        before + (text.strip() if strips else text) + end for text in answers
    ]
    end_id = tokenizer.convert_tokens_to_ids(end.strip())
    assert chat.end_of_turn_id(tokenizer) == end_id
    trained = [token for token, on in zip(ids, mask, strict=True) if on]
    assert trained.count(end_id) == len(answers)
    assert ids.count(end_id) == sum(turn["role"] in roles for turn in messages)
    if name != "chatml":
        once = sum(turn["role"] == "user" for turn in messages) if name == "llama2" else 1
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == once


@pytest.mark.parametrize("model", ["mistral-v1", "llama3"])
def test_bos_of_the_tokenizer_itself_is_not_added(made, model):
    tokenizer = chosen(made, "vicuna", model)
    text = chat.render(tokenizer, [ASK, TELL])
    doubled = tokenizer.encode(text)
    assert doubled[:2] == [tokenizer.bos_token_id] * 2
    assert encode(tokenizer, [ASK, TELL])[0] == doubled[1:]


@pytest.mark.parametrize(
    ("name", "model"), [("chatml", "smollm2"), ("tulu", "llama3"), ("zephyr", "gemma3")]
)
@pytest.mark.parametrize("lead", ["\n\n", "    "])
def test_white_space_that_joins_the_header_is_all_that_is_untrained(made, name, model, lead):
    tokenizer = chosen(made, name, model)
    messages = [ASK, assistant(f"{lead}Yes\n")]
    ids, mask = encode(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    end = AROUND[name][2].replace("eos", tokenizer.eos_token)
    [text] = trained_text(tokenizer, ids, mask)
    assert text.lstrip() == f"Yes\n{end}"
    assert f"{lead}Yes".endswith(text.removesuffix(f"\n{end}"))


# What the models' own code gives


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("mistral", "mistral-v1"),
        ("mistral-v3", "mistral-v2"),
        ("mistral-v3", "mistral-v3"),
        ("mistral-v3-tekken", "tekken-v3"),
        ("mistral-v7", "mistral-v7"),
    ],
)
def test_ids_are_those_of_mistral_common(made, name, model):
    tokenizer = chosen(made, name, model)
    from mistral_common.protocol.instruct.messages import (
        AssistantMessage,
        SystemMessage,
        UserMessage,
    )
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    kinds = {"user": UserMessage, "assistant": AssistantMessage, "system": SystemMessage}
    file = package("mistral_common") / "data" / MAKERS[model].args[0]
    theirs = MistralTokenizer.from_file(file)
    several = [ASK, TELL, user("  東京 👩‍🚀\n"), TELL2, ASK2]
    chats = [several, [SYSTEM, ASK]]
    if name in ("mistral", "mistral-v7"):  # of the rest their code moves a system turn to the end
        chats.append([SYSTEM, *several])
    for messages in chats:
        request = ChatCompletionRequest(
            messages=[kinds[turn["role"]](content=turn["content"]) for turn in messages]
        )
        assert theirs.encode_chat_completion(request).tokens == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )


def test_ids_are_those_of_llama_models(made):
    tokenizer = chosen(made, "llama3", "llama3")
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    theirs = ChatFormat(Tokenizer.get_instance())
    # Nothing to strip: this later code of Meta's does not, the templates of its models do.
    for messages in ([ASK], [SYSTEM, ASK, TELL, user("東京\n\n👩‍🚀"), TELL2, ASK2]):
        raw = [RawMessage(**turn, stop_reason="end_of_turn") for turn in messages]
        assert theirs.encode_dialog_prompt(raw).tokens == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )


def test_text_is_that_of_smollm2s_own_template(made, tmp_path):
    MAKERS["smollm2"](tmp_path)
    own, ours = chat.load_tokenizer(tmp_path), chat.load_tokenizer(tmp_path, "chatml")
    assert own.chat_template != ours.chat_template
    for messages in ([SYSTEM, ASK, TELL, ASK2, TELL2], [SYSTEM, ASK]):
        for generate in (False, True):
            assert chat.render(own, messages, generate) == chat.render(ours, messages, generate)
