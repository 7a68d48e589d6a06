"""Tokens on disk: made once, made anew when anything changes, every dropped row counted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tokenizer

from alignjax.config import Data
from alignjax.data import chat, rows, tokens
from alignjax.data.rows import Side
from alignjax.data.tokens import TokenSet


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)  # a token for each letter
    return directory


@pytest.fixture
def tokenizer(tokenizer_dir):
    return chat.load_tokenizer(tokenizer_dir)


def write(file: Path, data: list[dict], blank: int = 0) -> str:
    file.write_text("\n" * blank + "".join(json.dumps(row) + "\n" for row in data))
    return str(file)


def sft_row(prompt: str, completion: str, **more) -> dict:
    return {"prompt": prompt, "completion": completion} | more


def pair_row(prompt: str, chosen: str, rejected: str, **more) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def sequences(data: TokenSet) -> list[tuple[list[int], list[bool]]]:
    return [
        (data.tokens[a:b].tolist(), data.trained[a:b].tolist())
        for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)
    ]


def length(tokenizer, prompt: str, answer: str) -> int:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return len(tokenizer.encode(chat.render(tokenizer, turns), add_special_tokens=False))


PAIRS = [
    pair_row("why", "because", "no"),
    pair_row("how", "so", "thus it is"),
    pair_row("when", "now", "then"),
]


def make(path, tokenizer, tokenizer_dir, cache, stage="dpo", held_out=False, **settings):
    data = Data(path=path, **settings)
    return tokens.token_set(data, stage, held_out, tokenizer, tokenizer_dir, cache)


def forbid_tokenizing(monkeypatch):
    def refuse(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(tokens, "encode_side", refuse)


@pytest.mark.parametrize("strings", ["chat", "plain"])
def test_pairs_are_what_encode_side_says(tmp_path, tokenizer, tokenizer_dir, strings):
    path = write(tmp_path / "d.jsonl", PAIRS)
    made = make(path, tokenizer, tokenizer_dir, tmp_path, strings=strings)
    expected = []
    for row in PAIRS:
        for side in rows.pair_example(1, row, strings, "").sides:
            expected.append(chat.encode_side(tokenizer, side, "all", ""))
    assert sequences(made) == expected
    lengths = [len(ids) for ids, _ in expected]
    counts = [sum(mask) for _, mask in expected]
    assert (len(made), made.sides, made.file, made.dropped) == (3, 2, path, {})
    assert made.lines.tolist() == [1, 2, 3]
    assert made.lengths().tolist() == np.reshape(lengths, (3, 2)).sum(1).tolist()
    assert made.trained_counts().tolist() == np.reshape(counts, (3, 2)).tolist()
    dtypes = [made.tokens.dtype, made.trained.dtype, made.offsets.dtype, made.lines.dtype]
    assert dtypes == [np.int32, bool, np.int64, np.int64]


def test_sft_items_have_one_side(tmp_path, tokenizer, tokenizer_dir):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "d.jsonl", [sft_row("why", "so"), {"messages": turns * 2}])
    made = make(path, tokenizer, tokenizer_dir, tmp_path, "sft")
    ones = [
        Side([{"role": "user", "content": "why"}], [{"role": "assistant", "content": "so"}]),
        Side([], turns * 2),
    ]
    assert sequences(made) == [chat.encode_side(tokenizer, side, "all", "") for side in ones]
    assert (len(made), made.sides) == (2, 1)
    assert made.trained_counts().tolist() == [[3], [4]]  # bytes and <|im_end|>
    last = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", train_on="last")
    assert last.trained_counts().tolist() == [[3], [2]]


def test_second_time_nothing_is_tokenized(tmp_path, tokenizer, tokenizer_dir, monkeypatch):
    path = write(tmp_path / "d.jsonl", PAIRS)
    first = make(path, tokenizer, tokenizer_dir, tmp_path / "cache")
    forbid_tokenizing(monkeypatch)
    second = make(path, tokenizer, tokenizer_dir, tmp_path / "cache")
    assert sequences(second) == sequences(first)
    assert (second.key, second.dropped, second.sides) == (first.key, first.dropped, first.sides)
    assert second.lines.tolist() == first.lines.tolist()
    assert isinstance(second.tokens, np.memmap)
    with pytest.raises(AssertionError, match="tokenized again"):
        make(path, tokenizer, tokenizer_dir, tmp_path / "another cache")


def test_touching_or_moving_the_file_keeps_the_cache(
    tmp_path, tokenizer, tokenizer_dir, monkeypatch
):
    first = make(write(tmp_path / "d.jsonl", PAIRS), tokenizer, tokenizer_dir, tmp_path / "cache")
    forbid_tokenizing(monkeypatch)
    moved = write(tmp_path / "moved.jsonl", PAIRS)
    assert make(moved, tokenizer, tokenizer_dir, tmp_path / "cache").key == first.key


def test_another_row_is_another_cache(tmp_path, tokenizer, tokenizer_dir):
    path = write(tmp_path / "d.jsonl", PAIRS)
    first = make(path, tokenizer, tokenizer_dir, tmp_path / "cache")
    write(tmp_path / "d.jsonl", [PAIRS[0], pair_row("how", "so", "otherwise"), PAIRS[2]])
    second = make(path, tokenizer, tokenizer_dir, tmp_path / "cache")
    assert second.key != first.key
    text = tokenizer.decode(sequences(second)[3][0])
    assert text == "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\notherwise<|im_end|>\n"


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 512},
        {"strings": "plain"},
        {"train_on": "last"},
        {"overlong": "truncate"},
        {"eval_fraction": 0.5},
        {"split": "other"},
    ],
)
def test_another_setting_is_another_cache(tmp_path, tokenizer, tokenizer_dir, settings):
    path = write(tmp_path / "d.jsonl", PAIRS)
    first = make(path, tokenizer, tokenizer_dir, tmp_path / "cache")
    second = make(path, tokenizer, tokenizer_dir, tmp_path / "cache", **settings)
    assert second.key != first.key
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_another_template_or_tokenizer_is_another_cache(tmp_path, tokenizer_dir):
    path = write(tmp_path / "d.jsonl", PAIRS)
    first = make(path, chat.load_tokenizer(tokenizer_dir), tokenizer_dir, tmp_path)
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    other = chat.load_tokenizer(tokenizer_dir, str(template))
    second = make(path, other, tokenizer_dir, tmp_path)
    assert tokenizer_text(second, other, 0) == "user: why<|im_end|>assistant: because<|im_end|>"
    swapped = tmp_path / "swapped"
    write_tokenizer(swapped)
    file = json.loads((swapped / "tokenizer.json").read_text())
    vocab = file["model"]["vocab"]
    vocab["w"], vocab["h"] = vocab["h"], vocab["w"]
    (swapped / "tokenizer.json").write_text(json.dumps(file))
    third = make(path, chat.load_tokenizer(swapped), swapped, tmp_path)
    assert len({first.key, second.key, third.key}) == 3
    assert third.tokens.tolist() != first.tokens.tolist()


def tokenizer_text(data: TokenSet, tokenizer, sequence: int) -> str:
    return tokenizer.decode(sequences(data)[sequence][0])


def test_held_out_rows_and_stages_have_their_own_cache(tmp_path, tokenizer, tokenizer_dir):
    data = [row | {"split": "test" if i == 1 else "train"} for i, row in enumerate(PAIRS)]
    path = write(tmp_path / "d.jsonl", [row | {"completion": "c"} for row in data])
    train = make(path, tokenizer, tokenizer_dir, tmp_path)
    held_out = make(path, tokenizer, tokenizer_dir, tmp_path, held_out=True)
    sft = make(path, tokenizer, tokenizer_dir, tmp_path, "sft")
    assert (train.lines.tolist(), held_out.lines.tolist()) == ([1, 3], [2])
    assert (sft.sides, sft.lines.tolist()) == (1, [1, 3])
    assert len({train.key, held_out.key, sft.key}) == 3


def test_held_out_file_is_taken_whole(tmp_path, tokenizer, tokenizer_dir):
    train = write(tmp_path / "train.jsonl", PAIRS)
    test = write(tmp_path / "test.jsonl", [PAIRS[2] | {"split": "train"}, PAIRS[1]])
    held_out = make(train, tokenizer, tokenizer_dir, tmp_path, held_out=True, eval_path=test)
    assert (held_out.file, held_out.lines.tolist()) == (test, [1, 2])
    assert "thus it is" in tokenizer_text(held_out, tokenizer, 3)
    assert len(make(train, tokenizer, tokenizer_dir, tmp_path, eval_path=test)) == 3


def test_lines_are_the_files(tmp_path, tokenizer, tokenizer_dir):
    data = [PAIRS[0], pair_row("x", "same", "same"), PAIRS[1] | {"split": "other"}, PAIRS[2]]
    path = write(tmp_path / "d.jsonl", [{"split": "train"} | row for row in data], blank=2)
    made = make(path, tokenizer, tokenizer_dir, tmp_path)
    assert made.lines.tolist() == [3, 6]
    found = [
        json.loads(line)["prompt"]
        for line in Path(path).read_text().splitlines()
        if line and json.loads(line)["split"] == "train"
    ]
    assert found == ["why", "x", "when"]
    texts = [tokenizer_text(made, tokenizer, 2 * item) for item in range(2)]
    assert ["why" in texts[0], "when" in texts[1]] == [True, True]


def test_overlong_pairs_are_dropped_and_counted(tmp_path, tokenizer, tokenizer_dir):
    limit = length(tokenizer, "p", "a" * 20)
    data = [
        pair_row("p", "a" * 20, "b"),  # just fits
        pair_row("p", "a" * 21, "b"),
        pair_row("p", "b", "a" * 21),
        pair_row("p", "c", "d"),
    ]
    path = write(tmp_path / "d.jsonl", data)
    for overlong in ("drop", "truncate"):  # pairs are never truncated
        settings = {"max_length": limit, "overlong": overlong}
        made = make(path, tokenizer, tokenizer_dir, tmp_path, **settings)
        assert made.lines.tolist() == [1, 4]
        assert made.dropped == {f"longer than {limit} tokens": 2}
        assert np.diff(made.offsets).max() == limit


def test_overlong_conversations_are_dropped_or_truncated_and_counted(
    tmp_path, tokenizer, tokenizer_dir
):
    limit = length(tokenizer, "p", "a" * 20)
    data = [sft_row("p", "a" * n) for n in (20, 21, 300, 1)]
    path = write(tmp_path / "d.jsonl", data)
    dropped = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", max_length=limit)
    assert dropped.lines.tolist() == [1, 4]
    assert dropped.dropped == {f"longer than {limit} tokens": 2}
    settings = {"max_length": limit, "overlong": "truncate"}
    kept = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", **settings)
    assert kept.lines.tolist() == [1, 2, 3, 4]
    assert kept.dropped == {"truncated (kept)": 2}
    whole = make(path, tokenizer, tokenizer_dir, tmp_path, "sft")
    expected = [(ids[:limit], mask[:limit]) for ids, mask in sequences(whole)]
    assert sequences(kept) == expected
    # 21 a's less the newline and <|im_end|> that were cut off; then 300 a's as far as they fit.
    assert kept.trained_counts().ravel().tolist() == [21, 21 + 1, 21 + 1, 2]


def test_no_trained_token_is_dropped_and_counted_once(tmp_path, tokenizer, tokenizer_dir):
    data = [sft_row("p" * 200, "a"), sft_row("p", "a")]
    path = write(tmp_path / "d.jsonl", data)
    settings = {"max_length": 100, "overlong": "truncate"}
    made = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", **settings)
    assert made.lines.tolist() == [2]
    assert made.dropped == {"no trained token": 1}  # and not as truncated and kept


def test_identical_sides_are_dropped_and_counted(tmp_path, tokenizer, tokenizer_dir):
    data = [PAIRS[0], pair_row("x", "same", "same"), pair_row("x", "same", "same "), PAIRS[1]]
    path = write(tmp_path / "d.jsonl", data)
    made = make(path, tokenizer, tokenizer_dir, tmp_path)
    assert made.lines.tolist() == [1, 3, 4]
    assert made.dropped == {"chosen equals rejected": 1}


def test_all_rows_dropped_leaves_an_empty_set(tmp_path, tokenizer, tokenizer_dir):
    path = write(tmp_path / "d.jsonl", [pair_row("x", "same", "same")] * 2)
    made = make(path, tokenizer, tokenizer_dir, tmp_path)
    assert (len(made), made.offsets.tolist(), made.tokens.size) == (0, [0], 0)
    assert made.dropped == {"chosen equals rejected": 2}


def test_first_token_is_never_trained(tmp_path, tokenizer, tokenizer_dir):
    # Without a prompt, a header or a BOS the text's first token would be.
    data = [sft_row("", "abc"), sft_row("", "d")]
    path = write(tmp_path / "d.jsonl", data)
    made = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", strings="plain")
    side = chat.encode_side(tokenizer, Side("", "abc"), "all", "")
    assert side[1] == [True, True, True, True]
    assert [mask for _, mask in sequences(made)] == [[False, True, True, True], [False, True]]
    assert not made.trained[made.offsets[:-1]].any()


def test_only_a_first_token_is_no_trained_token(tmp_path, tokenizer, tokenizer_dir):
    path = write(tmp_path / "d.jsonl", [sft_row("", "abc")])
    settings = {"strings": "plain", "max_length": 1, "overlong": "truncate"}
    made = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", **settings)
    assert len(made) == 0
    assert made.dropped["no trained token"] == 1


def test_a_bad_row_names_its_line_and_leaves_no_cache(tmp_path, tokenizer, tokenizer_dir):
    path = write(tmp_path / "d.jsonl", [PAIRS[0], pair_row("q", "a", "")], blank=1)
    with pytest.raises(ValueError) as caught:
        make(path, tokenizer, tokenizer_dir, tmp_path / "cache")
    expected = f"{path}, line 3: an answer is empty; remove the row or fill it in."
    assert str(caught.value) == expected
    assert not list((tmp_path / "cache").rglob("*"))


def test_an_error_of_the_template_names_its_line(tmp_path, tokenizer, tokenizer_dir):
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    path = write(tmp_path / "d.jsonl", PAIRS)
    with pytest.raises(ValueError) as caught:
        make(path, tokenizer, tokenizer_dir, tmp_path / "cache")
    expected = f"{path}, line 1: the chat template refuses this row (never)."
    assert str(caught.value) == expected


def test_half_a_surrogate_names_its_line(tmp_path, tokenizer, tokenizer_dir):
    # JSON can hold half an emoji, as texts cut short do; no tokenizer takes it.
    path = write(tmp_path / "d.jsonl", [PAIRS[0], pair_row("q", "cut \ud83d", "b")])
    with pytest.raises(ValueError) as caught:
        make(path, tokenizer, tokenizer_dir, tmp_path / "cache")
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_progress_is_told_of_every_row(tmp_path, tokenizer, tokenizer_dir):
    path = write(tmp_path / "d.jsonl", [*PAIRS, pair_row("x", "same", "same")])
    told = []
    data = replace(Data(path=path), max_length=512)
    tokens.token_set(data, "dpo", False, tokenizer, tokenizer_dir, tmp_path, told.append)
    assert told == [1, 2, 3, 4]
    tokens.token_set(data, "dpo", False, tokenizer, tokenizer_dir, tmp_path, told.append)
    assert told == [1, 2, 3, 4]
