"""Long rows dropped, cut or split and bad rows skipped or refused, each of them counted."""

import dataclasses
import json

import numpy as np
import pytest
from tokencases import PAIRS, make, pair_row, sequences, sft_row, tokenizer_text, write
from tokenizers import normalizers

from alignjax.config import Data
from alignjax.data import chat, tokens
from alignjax.data.fitting import with_prompt_cut


def length(tokenizer, prompt: str, answer: str) -> int:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return len(tokenizer.encode(chat.render(tokenizer, turns), add_special_tokens=False))


def refusal(path, tokenizer, tokenizer_dir, cache, stage="dpo", **settings) -> str:
    with pytest.raises(ValueError) as caught:
        make(path, tokenizer, tokenizer_dir, cache, stage, **settings)
    return str(caught.value)


SKIP = " (--data.on_bad_row=skip goes on without such rows)."


# Long rows


def test_overlong_pairs_are_dropped_and_counted(tmp_path, tokenizer, tokenizer_dir):
    limit = length(tokenizer, "p", "a" * 20)
    data = [
        pair_row("p", "a" * 20, "b"),  # just fits
        pair_row("p", "a" * 21, "b"),
        pair_row("p", "b", "a" * 21, source="s"),
        pair_row("p", "c", "d"),
    ]
    path = write(tmp_path / "d.jsonl", data)
    for overlong in ("drop", "truncate", "split"):  # pairs are never changed
        settings = {"max_length": limit, "overlong": overlong}
        made = make(path, tokenizer, tokenizer_dir, tmp_path, **settings)
        assert made.lines.tolist() == [1, 4]
        dropped = f"longer than {limit} tokens, dropped"
        assert made.counts == {"read": 4, dropped: 2, "kept": 2}
        assert np.diff(made.offsets).max() == limit
        assert made.columns == []  # no kept row has a source


def test_the_prompt_of_a_pair_that_is_too_long_is_cut_from_the_left(
    tmp_path, tokenizer, tokenizer_dir
):
    data = [
        pair_row("p" * 40, "chosen", "no"),
        pair_row("p", "chosen", "no"),
        pair_row("p" * 40, "c" * 60, "no"),  # too long whatever its prompt is
    ]
    path = write(tmp_path / "d.jsonl", data)
    whole = make(path, tokenizer, tokenizer_dir, tmp_path)
    limit, budget = 40, 16
    made = make(
        path, tokenizer, tokenizer_dir, tmp_path, max_length=limit, max_prompt_length=budget
    )
    assert made.lines.tolist() == [1, 2]
    dropped = f"longer than {limit} tokens, dropped"
    assert made.counts == {"read": 3, dropped: 1, f"prompt cut to {budget} tokens": 1, "kept": 2}
    for (ids, mask), (all_ids, all_mask) in zip(
        sequences(made)[:2], sequences(whole)[:2], strict=True
    ):
        cut = len(all_ids) - len(ids)
        assert mask.index(True) == budget and cut > 0
        assert (ids, mask) == (all_ids[cut:], all_mask[cut:])
    assert sequences(made)[2:] == sequences(whole)[2:4]


def test_a_token_that_begins_every_text_outlives_a_cut():
    ids, mask = np.arange(10), np.arange(10) >= 6
    data = Data(max_length=8, max_prompt_length=3)
    for bos, expected in ((0, [0, 4, 5, 6, 7, 8, 9]), (None, [3, 4, 5, 6, 7, 8, 9])):
        (cut, trained), _ = with_prompt_cut([(ids, mask), (ids, mask)], data, bos)[0]
        assert cut.tolist() == expected and cut[trained].tolist() == [6, 7, 8, 9]


def test_overlong_conversations_are_dropped_or_truncated_and_counted(
    tmp_path, tokenizer, tokenizer_dir
):
    limit = length(tokenizer, "p", "a" * 20)
    data = [sft_row("p", "a" * n) for n in (20, 21, 300, 1)]
    path = write(tmp_path / "d.jsonl", data)
    dropped = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", max_length=limit)
    assert dropped.lines.tolist() == [1, 4]
    assert dropped.counts == {"read": 4, f"longer than {limit} tokens, dropped": 2, "kept": 2}
    settings = {"max_length": limit, "overlong": "truncate"}
    kept = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", **settings)
    assert kept.lines.tolist() == [1, 2, 3, 4]
    assert kept.counts == {"read": 4, f"longer than {limit} tokens, truncated": 2, "kept": 4}
    whole = make(path, tokenizer, tokenizer_dir, tmp_path, "sft")
    expected = [(ids[:limit], mask[:limit]) for ids, mask in sequences(whole)]
    assert sequences(kept) == expected
    # 21 a's less the newline and <|im_end|> that were cut off; then 300 a's as far as they fit.
    assert kept.trained_counts().ravel().tolist() == [21, 21 + 1, 21 + 1, 2]


def test_no_trained_token_after_truncation_is_dropped_and_counted_once(
    tmp_path, tokenizer, tokenizer_dir
):
    data = [sft_row("p" * 200, "a"), sft_row("p", "a"), sft_row("p", "a" * 200)]
    path = write(tmp_path / "d.jsonl", data)
    settings = {"max_length": 100, "overlong": "truncate"}
    made = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", **settings)
    assert made.lines.tolist() == [2, 3]
    assert list(made.counts.items()) == [
        ("read", 3),
        ("longer than 100 tokens, truncated", 1),
        ("no trained token after truncation, dropped", 1),
        ("kept", 2),
    ]


def test_only_a_first_token_is_no_trained_token(tmp_path, tokenizer, tokenizer_dir):
    path = write(tmp_path / "d.jsonl", [sft_row("", "abc")])
    settings = {"strings": "plain", "max_length": 1, "overlong": "truncate"}
    made = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", **settings)
    assert made.counts == {"read": 1, "no trained token after truncation, dropped": 1, "kept": 0}


def test_split_by_hand(tmp_path, tokenizer, tokenizer_dir):
    path = write(tmp_path / "d.jsonl", [sft_row("ask", "0123456789"), sft_row("ab", "cd")])
    settings = {"strings": "plain", "max_length": 6, "overlong": "split"}
    made = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", **settings)
    texts = [tokenizer_text(made, tokenizer, item) for item in range(len(made))]
    assert texts == ["ask012", "234567", "789<|im_end|>", "abcd<|im_end|>"]
    assert [mask for _, mask in sequences(made)] == [
        [False, False, False, True, True, True],
        [False, True, True, True, True, True],
        [False, True, True, True],
        [False, False, True, True, True],
    ]
    assert made.lines.tolist() == [1, 1, 1, 2]
    assert made.counts == {"read": 2, "longer than 6 tokens, split": 1, "kept": 2}


def test_pieces_without_a_trained_token_are_left_out(tmp_path, tokenizer, tokenizer_dir):
    path = write(tmp_path / "d.jsonl", [sft_row("ask what it is ", "a", source="s", weight=2)])
    settings = {"strings": "plain", "max_length": 4, "overlong": "split"}
    made = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", **settings)
    assert [tokenizer_text(made, tokenizer, i) for i in range(len(made))] == [
        "is a",
        "a<|im_end|>",
    ]
    assert made.weight.tolist() == [2, 2]
    assert made.trained_counts().tolist() == [[1], [1]]


@pytest.mark.parametrize("limit", [2, 3, 7, 26, 27, 28])
def test_split_trains_every_token_once(tmp_path, tokenizer, tokenizer_dir, limit):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc\n"}]
    data = [{"messages": turns * n, "weight": n} for n in (1, 2, 3)]
    path = write(tmp_path / "d.jsonl", data)
    whole = make(path, tokenizer, tokenizer_dir, tmp_path, "sft")
    settings = {"max_length": limit, "overlong": "split"}
    made = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", **settings)
    assert np.diff(made.offsets).max() <= limit
    assert made.trained_counts().all()
    for line, (ids, mask) in enumerate(sequences(whole), 1):
        own = [sequences(made)[item] for item in np.flatnonzero(made.lines == line)]
        trained = [i for piece in own for i, on in zip(*piece, strict=True) if on]
        assert trained == [i for i, on in zip(ids, mask, strict=True) if on]
        for piece, piece_mask in own:
            assert not piece_mask[0]
            assert any(ids[i : i + len(piece)] == piece for i in range(len(ids)))
    assert made.weight.tolist() == made.lines.tolist()


# Bad rows


def test_equal_tokens_of_both_sides_are_a_bad_row(tmp_path, tokenizer, tokenizer_dir):
    # Spaces at the ends are dropped by many templates.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content']", "m['content'].strip()"
    )
    data = [PAIRS[0], pair_row("x", "same", "same ")]
    path = write(tmp_path / "d.jsonl", data)
    said = "`chosen` and `rejected` have the same tokens, so neither is preferred; remove the row, "
    said += "or change one of them"
    assert refusal(path, tokenizer, tokenizer_dir, tmp_path) == f"{path}, line 2: {said}{SKIP}"
    made = make(path, tokenizer, tokenizer_dir, tmp_path, on_bad_row="skip")
    assert made.counts == {"read": 2, "bad rows, skipped": 1, "kept": 1}
    listed = [json.loads(line) for line in made.bad_rows_file.read_text().splitlines()]
    assert listed == [{"place": f"{path}, line 2", "problem": said + "."}]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_no_trained_token_is_a_bad_row(tmp_path, tokenizer, tokenizer_dir, stage):
    # Turns that nothing ends, and an answer of which nothing is left.
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>'", "''")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("abc", "")
    path = write(tmp_path / "d.jsonl", [pair_row("x", "c", "abc", completion="abc")])
    assert refusal(path, tokenizer, tokenizer_dir, tmp_path, stage) == (
        f"{path}, line 1: no token of it is trained, because the chat template leaves its answer "
        "out, or joins it into one token with the text around it; change the row, or name "
        f"another --model.chat_template{SKIP}"
    )
    made = make(path, tokenizer, tokenizer_dir, tmp_path, stage, on_bad_row="skip")
    assert made.counts == {"read": 1, "bad rows, skipped": 1, "kept": 0}
    assert (len(made), made.offsets.tolist(), made.tokens.size) == (0, [0], 0)
    assert made.trained_counts().shape == (0, 2 if stage == "dpo" else 1)


BAD = [
    "this is no JSON",
    json.dumps(pair_row("q", "a", "b")),
    json.dumps(pair_row("q", "a", "")),
    json.dumps(pair_row("q", "cut \ud83d", "b")),
    json.dumps(pair_row("q", "a", "b", weight="much")),
    json.dumps(pair_row("q", "c", "d")),
]


def test_bad_rows_of_every_kind_are_skipped_counted_and_listed(tmp_path, tokenizer, tokenizer_dir):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(BAD))
    made = make(str(path), tokenizer, tokenizer_dir, tmp_path, on_bad_row="skip")
    assert made.counts == {"read": 6, "bad rows, skipped": 4, "kept": 2}
    assert made.lines.tolist() == [2, 6]
    listed = [json.loads(line) for line in made.bad_rows_file.read_text().splitlines()]
    assert [row["place"] for row in listed] == [f"{path}, line {n}" for n in (1, 3, 4, 5)]
    assert [row["problem"][:12] for row in listed][2:] == ["the text is ", "weight='much"]
    assert not any(str(path) in row["problem"] for row in listed)
    good = write(tmp_path / "e.jsonl", [pair_row("q", "a", "b"), pair_row("q", "c", "d")])
    alone = make(good, tokenizer, tokenizer_dir, tmp_path)
    assert sequences(made) == sequences(alone)
    assert (alone.bad_rows_file, len(alone)) == (None, 2)


@pytest.mark.parametrize("at", [0, 2, 3, 4])
def test_the_first_bad_row_stops_and_leaves_no_cache(tmp_path, tokenizer, tokenizer_dir, at):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([BAD[1], *BAD[at:]]))
    said = refusal(str(path), tokenizer, tokenizer_dir, tmp_path / "cache")
    assert said.startswith(f"{path}, line 2: ")
    assert said.endswith(SKIP)
    assert said.count(".)") == 0
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_an_error_of_the_template_names_its_line(tmp_path, tokenizer, tokenizer_dir):
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    path = write(tmp_path / "d.jsonl", PAIRS)
    sentence = refusal(path, tokenizer, tokenizer_dir, tmp_path)
    assert sentence.startswith(f"{path}, line 1: the chat template refuses this row (never); ")
    assert sentence.endswith(SKIP)


def test_a_missing_template_is_no_rows_fault(tmp_path, tokenizer, tokenizer_dir):
    tokenizer.chat_template = None
    path = write(tmp_path / "d.jsonl", PAIRS)
    assert refusal(path, tokenizer, tokenizer_dir, tmp_path, on_bad_row="skip") == (
        f"{path}, line 1: the model has no chat template; name one with --model.chat_template=NAME "
        "(or a file), or set data.strings=plain for plain text."
    )


def test_examples_skip_bad_rows_or_stop(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([BAD[1], BAD[0], BAD[2], BAD[5]]))
    data = Data(path=str(path), on_bad_row="skip")
    found = tokens.examples(data, "dpo", held_out=False)
    assert [str(example.place) for example in found] == [f"{path}, line 1", f"{path}, line 4"]
    found = tokens.examples(dataclasses.replace(data, on_bad_row="stop"), "dpo", held_out=False)
    assert next(found).row["chosen"] == "a"
    with pytest.raises(ValueError) as caught:
        next(found)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert str(caught.value).endswith(SKIP)
