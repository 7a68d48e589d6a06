"""Plain text, many conversations at a time, masks by characters, and tokenizers as they load."""

import json

import numpy as np
import pytest
from templates import (
    ASK,
    ASK2,
    DROPS_EARLIER_ANSWERS,
    TELL,
    TELL2,
    TEXT,
    WHERE,
    assistant,
    backend,
    by_pieces,
    chatml,
    encode,
    encode_side,
    gemma,
    llama_2,
    user,
)
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import AutoTokenizer

from alignjax.data import chat, rows
from alignjax.data.columns import Side
from alignjax.data.formats import Place

# Plain text


def plain(tokenizer, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
    return encode_side(tokenizer, Side(prompt, answer))


def test_plain_text_by_pieces():
    tokenizer = chatml()  # puts no BOS before a text
    expected = by_pieces(tokenizer, "Tell me:", "* The sky is blue.<|im_end|>")
    assert plain(tokenizer, "Tell me:", " The sky is blue.") == expected


def test_plain_text_has_bos_once_and_eos_once():
    tokenizer = llama_2()
    ids, mask = plain(tokenizer, "Tell me:\n", "The sky is blue.")
    assert (ids, mask) == by_pieces(tokenizer, "<s>Tell me:\n", "*The sky is blue.</s>")
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)


def test_plain_text_needs_no_template_and_no_prompt():
    tokenizer = llama_2(pad="</s>")
    tokenizer.chat_template = None
    expected = by_pieces(tokenizer, "<s>", "*The sky is blue.</s>")
    assert plain(tokenizer, "", "The sky is blue.") == expected


def test_eos_in_the_text_or_from_the_tokenizer_is_not_doubled():
    tokenizer = llama_2()
    expected = by_pieces(tokenizer, "<s>Tell me:", "* Yes</s>")
    assert plain(tokenizer, "Tell me:", " Yes</s>") == expected
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    assert plain(tokenizer, "Tell me:", " Yes") == expected


@pytest.mark.parametrize("make", [chatml, llama_2])
def test_what_tells_plain_sides_apart_is_trained(make):
    # " blue" and " green" are one token each, and begin before the words do.
    tokenizer = make()
    row = {"chosen": "the sky is blue", "rejected": "the sky is green"}
    example = rows.example("dpo", row, Place("f.jsonl", 7, "line"), "plain")
    encoded = [encode_side(tokenizer, side) for side in example.sides]
    for (ids, mask), word in zip(encoded, ("blue", "green"), strict=True):
        trained = [token for token, on in zip(ids, mask, strict=True) if on]
        assert tokenizer.decode(trained).strip() == f"{word}{tokenizer.eos_token}"


def test_explicit_plain_prompt_that_ends_in_a_space_leaves_the_answer_whole():
    tokenizer = llama_2()
    ids, mask = plain(tokenizer, "Tell me: ", "the sky")
    trained = [token for token, on in zip(ids, mask, strict=True) if on]
    assert tokenizer.decode(trained).strip() == "the sky</s>"


# Many at a time

WORDS = [
    "sky",
    " sky ",
    "déjà",
    "🐝",
    "\n",
    "<|im_end|>",
    "</s>",
    "  ",
    "1, 2",
    "\u3000",
    "e\u0301",
]


def random_chat(rng) -> Side:
    """Up to four questions and answers with spaces at their ends; the last is not empty."""
    texts = ["".join(rng.choice(WORDS, rng.integers(1, 7))) for _ in range(rng.integers(1, 5) * 2)]
    turns = [(assistant if i % 2 else user)(text) for i, text in enumerate(texts)]
    prompt = int(rng.integers(0, len(turns)))
    return Side(turns[:prompt], turns[prompt:])


@pytest.mark.parametrize("make", [chatml, llama_2, gemma])
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_a_conversation_is_encoded_alike_alone_and_among_others(make, train_on):
    # Alone, what is around an answer is found anew; among others it is remembered.
    tokenizer, rng = make(), np.random.default_rng(0)
    sides = [random_chat(rng) for _ in range(200)]
    sides[50] = Side("the sky", " is blue")  # plain text may stand between
    found = chat.encode_sides(tokenizer, [(side, WHERE) for side in sides], train_on)
    for side, (ids, mask) in zip(sides, found, strict=True):
        assert (ids.tolist(), mask.tolist()) == encode_side(tokenizer, side, train_on)


def test_a_bad_conversation_spoils_no_other():
    tokenizer = llama_2()
    good, bad = Side([ASK], [TELL]), Side([ASK, ASK2], [TELL])
    half = Side("the sky", " is \ud83d")
    sides = [good, bad, good, half, Side([user("\ud83d")], [TELL]), Side("the sky", " is blue")]
    places = [(side, f"f.jsonl, line {i}") for i, side in enumerate(sides)]
    found = chat.encode_sides(tokenizer, places, "all")
    unicode = "remove the character."
    assert [str(found[i]) for i in (1, 3, 4)] == [
        "f.jsonl, line 1: the chat template refuses this row (roles must alternate "
        "user/assistant/user/assistant); change the row, or name another --model.chat_template.",
        "f.jsonl, line 3: the text is not valid Unicode (half a surrogate pair at character 11); "
        + unicode,
        "f.jsonl, line 4: the text is not valid Unicode (half a surrogate pair at character 10); "
        + unicode,
    ]
    for i in (0, 2, 5):
        assert (found[i][0].tolist(), found[i][1].tolist()) == encode_side(tokenizer, sides[i])


def test_no_sides_are_no_sequences():
    assert chat.encode_sides(chatml(), [], "all") == []


@pytest.mark.parametrize("make", [chatml, llama_2, gemma])
def test_a_turn_costs_one_render_once_its_surroundings_are_known(make, monkeypatch):
    tokenizer, rendered = make(), []

    def counted(*arguments, **options):
        rendered.append(1)
        return real(*arguments, **options)

    real = chat.render
    monkeypatch.setattr(chat, "render", counted)
    sides = [(Side([ASK], [assistant(text)]), WHERE) for text in ("Yes", " no", "1\n", "  ")]
    chat.encode_sides(tokenizer, sides, "all")
    assert len(rendered) == 4 * 2 + 2  # the text and the header; for the first two more
    rendered.clear()
    chat.encode_sides(tokenizer, [(Side([], [ASK, TELL, ASK2, TELL2]), WHERE)] * 3, "all")
    assert len(rendered) == 3 * 3 + 2


# Tokens and characters


def sentencepiece_like() -> Tokenizer:
    """Metaspace with a normalizer that adds, removes and joins characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.NFKC(), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return tokenizer


def trimming() -> Tokenizer:
    """Byte-level, with offsets that leave the space before a word out."""
    tokenizer = Tokenizer.from_str(backend(("<s>", "</s>")))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.mark.parametrize("make", [sentencepiece_like, trimming])
def test_masks_are_those_of_a_look_at_every_token(make):
    tokenizer, rng = make(), np.random.default_rng(0)
    letters = [*"abc  \n.é🐝ｱｶﾞ\u3000ﬁ①", "e\u0301", "a\u0323\u0302", "</s>", "the sky", "👩‍🚀"]
    some = 0
    for _ in range(500):
        text = "".join(rng.choice(letters, rng.integers(1, 40)))
        encoding = tokenizer.encode(text, add_special_tokens=False)
        cuts = np.sort(rng.integers(0, len(text) + 1, 4)).tolist()
        spans = [(cuts[0], cuts[1]), (cuts[2], cuts[3])]
        ids, mask = chat._mask_spans(encoding, spans)
        assert ids.tolist() == encoding.ids
        assert mask.tolist() == [
            any(start <= first and last <= end for start, end in spans)
            for first, last in encoding.offsets
        ]
        some += 0 < mask.sum() < len(mask)
    assert some > 400


# Loading


def test_load_tokenizer_with_its_own_template_and_another(tmp_path):
    chatml().save_pretrained(tmp_path / "model")
    loaded = chat.load_tokenizer(tmp_path / "model")
    assert encode(loaded, [ASK, TELL]) == encode(chatml(), [ASK, TELL])
    other = tmp_path / "other.jinja"
    other.write_text(DROPS_EARLIER_ANSWERS)
    loaded = chat.load_tokenizer(tmp_path / "model", str(other))
    assert chat.render(loaded, [user("Why?")]) == "<|im_start|>user\nWhy?<|im_end|>"
    rendered = chat.render(loaded, [user("Why?")], generate=True)
    assert rendered == "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"


def test_load_tokenizer_refusals(tmp_path):
    chatml().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError) as caught:
        chat.load_tokenizer(tmp_path / "model", "none.jinja")
    said = "model.chat_template=none.jinja: there is no such file, nor is it one of: chatml, "
    assert str(caught.value).startswith(said)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError) as caught:
        chat.load_tokenizer(tmp_path / "empty")
    assert str(caught.value).startswith(f"{tmp_path / 'empty'}: its tokenizer does not load (")
    assert "\n" not in str(caught.value)


def test_a_package_that_a_tokenizer_needs_is_told(tmp_path, monkeypatch):
    def needs(*arguments, **options):
        raise ImportError("\nreading tekken.json needs mistral-common.\nInstall it.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", needs)
    with pytest.raises(ValueError) as caught:
        chat.load_tokenizer(tmp_path)
    said = f"{tmp_path}: its tokenizer does not load (reading tekken.json needs mistral-common)"
    assert str(caught.value).startswith(said)


def test_truncation_and_padding_of_the_tokenizers_file_are_off(tmp_path):
    chatml().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    stored = json.loads(file.read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    file.write_text(json.dumps(stored | {"truncation": cut, "padding": pad}))
    assert len(Tokenizer.from_file(str(file)).encode("The sky is blue and green").ids) == 64
    loaded = chat.load_tokenizer(tmp_path)
    assert encode(loaded, [ASK, TELL]) == encode(chatml(), [ASK, TELL])


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_an_answer_that_is_kept_out_is_not_trained(train_on):
    turns = [ASK, TELL, ASK2, TELL2]
    sides = [Side([], turns, kept_out) for kept_out in ((), (1,), (3,))]
    whole, first_out, last_out = (
        found[1] for found in chat.encode_sides(chatml(), [(s, WHERE) for s in sides], train_on)
    )
    first, last = (
        chat.encode_sides(chatml(), [(Side(turns[:i], turns[i:]), WHERE)], "all")[0][1]
        for i in (1, 3)
    )
    assert (first_out == last).all() and not (last_out & last).any()
    assert (last_out == (first & ~last)).all()
    assert (whole == (first if train_on == "all" else last)).all()
    (refused,) = chat.encode_sides(chatml(), [(sides[1], WHERE)], "everything")
    assert str(refused).startswith(f"{WHERE}: ") and "data.train_on" in str(refused)
