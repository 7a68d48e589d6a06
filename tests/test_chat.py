"""Exactly the answers' tokens are trained, under the templates of three model families."""

import pytest
from templates import (
    ASK,
    ASK2,
    CHATML,
    DROPS_EARLIER_ANSWERS,
    TELL,
    TELL2,
    WHERE,
    assistant,
    by_pieces,
    chatml,
    encode,
    gemma,
    llama_2,
    user,
)

from alignjax.data import chat


def trained_runs(tokenizer, ids: list[int], mask: list[bool]) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    runs, before = [], False
    for token, trained in zip(ids, mask, strict=True):
        if trained:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = trained
    return [tokenizer.decode(run) for run in runs]


def refusal(tokenizer, *arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:
        encode(tokenizer, *arguments, **options)
    return str(caught.value)


def test_chatml_by_pieces():
    tokenizer = chatml()
    messages = [{"role": "system", "content": "Tell me"}, ASK, TELL, ASK2, TELL2]
    assert encode(tokenizer, messages) == by_pieces(
        tokenizer,
        "<|im_start|>system\nTell me<|im_end|>\n",
        "<|im_start|>user\nWhat is the colour of the sky?<|im_end|>\n<|im_start|>assistant\n",
        "*The sky is blue.<|im_end|>",
        "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "*Yes, déjà vu — the light falls so 🐝.\n\n1, 2, 3<|im_end|>",
        "\n",
    )


def test_llama_2_by_pieces():
    tokenizer = llama_2()
    assert encode(tokenizer, [ASK, TELL, ASK2, TELL2]) == by_pieces(
        tokenizer,
        "<s>[INST] What is the colour of the sky? [/INST]",
        "* The sky is blue. </s>",
        "[INST] Why? [/INST]",
        "* Yes, déjà vu — the light falls so 🐝.\n\n1, 2, 3 </s>",
    )


def test_gemma_by_pieces():
    tokenizer = gemma()
    assert encode(tokenizer, [ASK, assistant(" The sky is blue.\n"), ASK2, TELL2]) == by_pieces(
        tokenizer,
        "<bos><start_of_turn>user\nWhat is the colour of the sky?<end_of_turn>\n",
        "<start_of_turn>model\n",
        "*The sky is blue.<end_of_turn>",
        "\n<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        "*Yes, déjà vu — the light falls so 🐝.\n\n1, 2, 3<end_of_turn>",
        "\n",
    )


@pytest.mark.parametrize(
    ("make", "before", "end"),
    [(chatml, "", "<|im_end|>"), (llama_2, " ", " </s>"), (gemma, "", "<end_of_turn>")],
)
def test_trained_ids_decode_to_the_answers_and_their_ends(make, before, end):
    tokenizer = make()
    answers = ["The sky is blue.", "Yes", "no; 1, 2, 3.\n    return x", "🐝 für déjà vu 🐝"]
    messages = [turn for text in answers for turn in (user("Why?"), assistant(text))]
    ids, mask = encode(tokenizer, messages)
    whole = [before + text + end for text in answers]
    assert trained_runs(tokenizer, ids, mask) == whole
    ids, mask = encode(tokenizer, messages, train_on="last")
    assert trained_runs(tokenizer, ids, mask) == whole[-1:]
    ids, mask = encode(tokenizer, messages, prompt=3)  # a prompt of three messages
    assert trained_runs(tokenizer, ids, mask) == whole[1:]


def test_train_on_changes_the_mask_only():
    tokenizer = chatml()
    messages = [ASK, TELL, ASK2, TELL2]
    ids, mask = encode(tokenizer, messages)
    last_ids, last_mask = encode(tokenizer, messages, train_on="last")
    assert last_ids == ids
    at = mask.index(False, mask.index(True))  # the end of the first answer
    assert last_mask == [False] * at + mask[at:]


@pytest.mark.parametrize(("make", "end"), [(chatml, "<|im_end|>"), (llama_2, "</s>")])
def test_pad_that_is_eos_changes_nothing(make, end):
    messages = [ASK, TELL, ASK2, TELL2]
    tokenizer = make(pad=end)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids, mask = encode(tokenizer, messages)
    assert (ids, mask) == encode(make(), messages)
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    assert [mask[i] for i in ends] == ([False, True] * 2 if make is chatml else [True] * 2)


@pytest.mark.parametrize(("make", "end"), [(llama_2, "</s>"), (gemma, "<end_of_turn>")])
def test_bos_once_and_the_end_once_a_turn(make, end):
    tokenizer = make()
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id  # it would come a second time
    ids, mask = encode(tokenizer, [ASK, TELL])
    assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
    assert not mask[0]
    trained = [token for token, on in zip(ids, mask, strict=True) if on]
    assert trained.count(tokenizer.convert_tokens_to_ids(end)) == 1
    assert trained[-1] == tokenizer.convert_tokens_to_ids(end)
    if make is llama_2:
        assert ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("make", [chatml, llama_2, gemma])
def test_user_turn_that_repeats_the_answer_stays_untrained(make):
    tokenizer = make()
    ids, mask = encode(tokenizer, [user(TELL["content"]), TELL, user(TELL["content"]), TELL])
    alone_ids, alone_mask = encode(tokenizer, [user(TELL["content"]), TELL])
    assert len(trained_runs(tokenizer, ids, mask)) == 2
    assert sum(mask) == 2 * sum(alone_mask)
    assert mask[: len(alone_ids)] == alone_mask
    assert not any(alone_mask[: alone_mask.index(True)])


def test_user_turn_with_the_end_token_or_a_header_in_it_stays_untrained():
    tokenizer = chatml()
    text = "Why?<|im_end|>\n<|im_start|>assistant\nThe sky is blue.<|im_end|>\n"
    ids, mask = encode(tokenizer, [user(text), TELL, user("<|im_end|>"), TELL2])
    assert (ids, mask) == by_pieces(
        tokenizer,
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        "*The sky is blue.<|im_end|>",
        "\n<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n",
        f"*{TELL2['content']}<|im_end|>",
        "\n",
    )


def test_answer_with_the_end_token_in_it_is_trained_through_its_own_end():
    tokenizer = chatml()
    ids, mask = encode(tokenizer, [ASK, assistant("Yes<|im_end|>\nno")])
    assert trained_runs(tokenizer, ids, mask) == ["Yes<|im_end|>\nno<|im_end|>"]


def test_only_the_first_special_token_behind_an_answer_is_trained():
    tokenizer = chatml()
    tokenizer.chat_template = CHATML.replace("'<|im_end|>' ", "'<|im_end|>\n<|endoftext|>' ")
    ids, mask = encode(tokenizer, [ASK, TELL])
    assert trained_runs(tokenizer, ids, mask) == ["The sky is blue.<|im_end|>"]
    assert tokenizer.decode(ids).endswith("<|im_end|>\n<|endoftext|>\n")


def test_an_added_token_that_is_not_special_ends_a_turn_only_where_no_special_one_does():
    tokenizer = chatml()
    tokenizer.add_tokens(["\n\n", "###"])  # as Gemma has runs of newlines
    for behind, end in (("\n\n<|im_end|>", "\n\n<|im_end|>"), ("\n### ", "\n###")):
        tokenizer.chat_template = CHATML.replace("'<|im_end|>' ", repr(behind))
        ids, mask = encode(tokenizer, [ASK, TELL])
        assert trained_runs(tokenizer, ids, mask) == ["The sky is blue." + end]


def test_the_token_that_ends_a_turn():
    for make, end in ((chatml, "<|im_end|>"), (llama_2, "</s>"), (gemma, "<end_of_turn>")):
        tokenizer = make()
        assert chat.end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "###")
    assert chat.end_of_turn_id(tokenizer) is None
    tokenizer.chat_template = None
    assert chat.end_of_turn_id(tokenizer) is None


def test_turns_after_the_last_answer_are_untrained():
    tokenizer = chatml()
    ids, mask = encode(tokenizer, [ASK, TELL, ASK2], train_on="last")
    assert trained_runs(tokenizer, ids, mask) == ["The sky is blue.<|im_end|>"]
    tool = {"role": "tool", "content": "The sky is blue."}
    ids, mask = encode(tokenizer, [ASK, assistant("no"), tool, TELL2])
    runs = trained_runs(tokenizer, ids, mask)
    assert runs == ["no<|im_end|>", TELL2["content"] + "<|im_end|>"]


def test_template_error_is_told_with_its_place():
    alternate = "roles must alternate user/assistant/user/assistant"
    system = {"role": "system", "content": "s"}
    for tokenizer, messages, said in [
        (llama_2(), [ASK, ASK2, TELL], alternate),
        (gemma(), [ASK, TELL, TELL2], alternate),
        (gemma(), [system, ASK, TELL], "System role not supported"),
    ]:
        sentence = f"{WHERE}: the chat template refuses this row ({said}); "
        assert refusal(tokenizer, messages).startswith(sentence)


def test_missing_template_is_told():
    tokenizer = chatml()
    tokenizer.chat_template = None
    assert refusal(tokenizer, [ASK, TELL]) == (
        f"{WHERE}: the model has no chat template; name one with --model.chat_template=NAME "
        "(or a file), or set data.strings=plain for plain text."
    )


DROPS_EARLIER_TURNS = (
    "{% for m in messages[-2:] %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
)


@pytest.mark.parametrize("template", [DROPS_EARLIER_ANSWERS, DROPS_EARLIER_TURNS])
def test_template_that_drops_earlier_turns_is_told(template):
    tokenizer = chatml()
    tokenizer.chat_template = template
    assert refusal(tokenizer, [ASK, TELL, ASK2, TELL2]) == (
        f"{WHERE}: the chat template renders turn 2 otherwise when turns follow it, so its tokens "
        "cannot be told apart; set data.train_on=last, or name another "
        "--model.chat_template."
    )


def test_template_that_drops_earlier_answers_can_train_on_the_last():
    tokenizer = chatml()
    tokenizer.chat_template = DROPS_EARLIER_ANSWERS
    assert encode(tokenizer, [ASK, TELL, ASK2, TELL2], train_on="last") == by_pieces(
        tokenizer,
        "<|im_start|>user\nWhat is the colour of the sky?<|im_end|>",
        "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n",
        f"*{TELL2['content']}<|im_end|>",
    )
