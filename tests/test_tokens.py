"""Tokens of pairs and conversations: every row and side, of files and chunks of any size."""

import json
import tracemalloc

import numpy as np
import pytest
from tokencases import PAIRS, make, pair_row, same, sequences, sft_row, tokenizer_text, write

from alignjax.config import Data
from alignjax.data import chat, rows, tokens
from alignjax.data.columns import Side
from alignjax.data.formats import Place


def encoded(tokenizer, *sides: Side) -> list[tuple[list[int], list[bool]]]:
    found = chat.encode_sides(tokenizer, [(side, "") for side in sides], "all")
    return [(ids.tolist(), mask.tolist()) for ids, mask in found]


@pytest.mark.parametrize("strings", ["chat", "plain"])
def test_pairs_are_what_encode_sides_says(tmp_path, tokenizer, tokenizer_dir, strings):
    path = write(tmp_path / "d.jsonl", PAIRS)
    made = make(path, tokenizer, tokenizer_dir, tmp_path, strings=strings)
    place = Place(path, 1, "line")
    examples = [rows.example("dpo", row, place, strings) for row in PAIRS]
    expected = encoded(tokenizer, *(side for example in examples for side in example.sides))
    assert sequences(made) == expected
    lengths = [len(ids) for ids, _ in expected]
    counts = [sum(mask) for _, mask in expected]
    assert (len(made), made.sides, made.counts) == (3, 2, {"read": 3, "kept": 3})
    assert made.lines.tolist() == [1, 2, 3]
    assert [made.place(item) for item in range(3)] == [f"{path}, line {n}" for n in (1, 2, 3)]
    assert made.lengths().tolist() == np.reshape(lengths, (3, 2)).sum(1).tolist()
    assert made.trained_counts().tolist() == np.reshape(counts, (3, 2)).tolist()
    dtypes = [made.tokens.dtype, made.trained.dtype, made.offsets.dtype, made.lines.dtype]
    assert dtypes == [np.int32, bool, np.int64, np.int64]
    dtypes = [made.file_index.dtype, made.margin.dtype, made.weight.dtype, made.source.dtype]
    assert dtypes == [np.int32, np.float32, np.float32, np.int32]
    assert made.turns.dtype == np.int32


def test_sft_items_have_one_side(tmp_path, tokenizer, tokenizer_dir):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "d.jsonl", [sft_row("why", "so"), {"messages": turns * 2}])
    made = make(path, tokenizer, tokenizer_dir, tmp_path, "sft")
    ones = [
        Side([{"role": "user", "content": "why"}], [{"role": "assistant", "content": "so"}]),
        Side([], turns * 2),
    ]
    assert sequences(made) == encoded(tokenizer, *ones)
    assert (len(made), made.sides) == (2, 1)
    assert made.trained_counts().tolist() == [[3], [4]]  # bytes and <|im_end|>
    last = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", train_on="last")
    assert last.trained_counts().tolist() == [[3], [2]]
    everything = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", train_on="everything")
    assert everything.trained_counts().ravel().tolist() == (everything.lengths() - 1).tolist()
    assert everything.tokens.tolist() == made.tokens.tolist()


def test_held_out_file_is_taken_whole(tmp_path, tokenizer, tokenizer_dir):
    train = write(tmp_path / "train.jsonl", PAIRS)
    test = write(tmp_path / "test.jsonl", [PAIRS[2] | {"split": "train"}, PAIRS[1]])
    held_out = make(train, tokenizer, tokenizer_dir, tmp_path, held_out=True, eval_path=test)
    assert [held_out.place(item) for item in (0, 1)] == [f"{test}, line 1", f"{test}, line 2"]
    assert "thus it is" in tokenizer_text(held_out, tokenizer, 3)
    assert len(make(train, tokenizer, tokenizer_dir, tmp_path, eval_path=test)) == 3


def test_lines_are_the_files(tmp_path, tokenizer, tokenizer_dir):
    data = [PAIRS[0], PAIRS[1] | {"split": "other"}, PAIRS[2]]
    path = write(tmp_path / "d.jsonl", [{"split": "train"} | row for row in data], blank=2)
    made = make(path, tokenizer, tokenizer_dir, tmp_path)
    assert made.lines.tolist() == [3, 5]
    texts = [tokenizer_text(made, tokenizer, 2 * item) for item in range(2)]
    assert ["why" in texts[0], "when" in texts[1]] == [True, True]


def test_places_of_several_files_name_the_file_and_its_unit(tmp_path, tokenizer, tokenizer_dir):
    write(tmp_path / "b.jsonl", [PAIRS[2]])
    write(tmp_path / "a.jsonl", PAIRS[:2], blank=1)
    (tmp_path / "c.json").write_text(json.dumps([PAIRS[0]]))
    path = f"{tmp_path}/*.jsonl,{tmp_path}/c.json"
    made = make(path, tokenizer, tokenizer_dir, tmp_path / "cache")
    assert [made.place(item) for item in range(4)] == [
        f"{tmp_path / 'a.jsonl'}, line 2",
        f"{tmp_path / 'a.jsonl'}, line 3",
        f"{tmp_path / 'b.jsonl'}, line 1",
        f"{tmp_path / 'c.json'}, row 1",
    ]
    assert made.file_index.tolist() == [0, 0, 1, 2]
    assert "when" in tokenizer_text(made, tokenizer, 4)


def test_user_turns_of_prompts_are_counted(tmp_path, tokenizer, tokenizer_dir):
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    system = {"role": "system", "content": "s"}
    prompts = ["p", [asked], [system, asked, said, asked], [asked, said] * 2 + [asked]]
    data = [pair_row(prompt, "yes", "no") for prompt in prompts]
    data.append({"chosen": [asked, said, asked, said], "rejected": [asked, said, asked, asked]})
    data[-1]["rejected"][-1] = said | {"content": "b"}
    made = make(write(tmp_path / "d.jsonl", data), tokenizer, tokenizer_dir, tmp_path)
    assert made.turns.tolist() == [1, 1, 2, 3, 2]
    plain = [{"prompt": "p ", "chosen": "yes", "rejected": "no"}]
    path = write(tmp_path / "plain.jsonl", plain)
    made = make(path, tokenizer, tokenizer_dir, tmp_path, strings="plain")
    assert made.turns.tolist() == [0]


def test_margin_weight_and_source_are_carried(tmp_path, tokenizer, tokenizer_dir):
    more = [{"margin": 1.5, "source": "b"}, {}, {"weight": 0.25, "source": "a"}, {"source": "b"}]
    data = [pair_row("p", "yes", "no") | columns for columns in more]
    made = make(write(tmp_path / "d.jsonl", data), tokenizer, tokenizer_dir, tmp_path)
    assert made.margin.tolist() == [1.5, 0, 0, 0]
    assert made.weight.tolist() == [1, 1, 0.25, 1]
    assert [made.sources[i] for i in made.source] == ["b", "", "a", "b"]
    assert made.columns == ["margin", "weight", "source"]
    data[0].pop("margin")
    made = make(write(tmp_path / "e.jsonl", data), tokenizer, tokenizer_dir, tmp_path)
    assert (made.columns, made.margin.tolist()) == (["weight", "source"], [0] * 4)
    made = make(write(tmp_path / "f.jsonl", PAIRS), tokenizer, tokenizer_dir, tmp_path)
    assert (made.columns, made.sources, made.source.tolist()) == ([], [""], [0] * 3)
    assert made.weight.tolist() == [1] * 3


# The rest


def test_first_token_is_never_trained(tmp_path, tokenizer, tokenizer_dir):
    # Without a prompt, a header or a BOS the text's first token would be.
    data = [sft_row("", "abc"), sft_row("", "d")]
    path = write(tmp_path / "d.jsonl", data)
    made = make(path, tokenizer, tokenizer_dir, tmp_path, "sft", strings="plain")
    [(_, mask)] = encoded(tokenizer, Side("", "abc"))
    assert mask == [True, True, True, True]
    assert [mask for _, mask in sequences(made)] == [[False, True, True, True], [False, True]]
    assert not made.trained[made.offsets[:-1]].any()


def test_progress_is_told_of_every_chunk(tmp_path, tokenizer, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(tokens, "_CHUNK", 4)
    data = [*PAIRS, PAIRS[0] | {"prompt": "who"}, PAIRS[0] | {"prompt": "whom"}]
    told = []
    arguments = (Data(path=write(tmp_path / "d.jsonl", data)), "dpo", False)
    tokens.token_set(*arguments, tokenizer, tokenizer_dir, tmp_path, told.append)
    assert told == [2, 4, 5]
    tokens.token_set(*arguments, tokenizer, tokenizer_dir, tmp_path, told.append)
    assert told == [2, 4, 5]


@pytest.mark.parametrize("chunk", [2, 3, 7])
def test_the_size_of_a_chunk_changes_nothing(
    tmp_path, tokenizer, tokenizer_dir, monkeypatch, chunk
):
    more = [
        {"source": "ab"[i % 2], "margin": i, "split": "test" if i % 3 == 0 else "train"}
        for i in range(20)
    ]
    data = [pair_row(f"p{i}", "a" * i, "b") | columns for i, columns in enumerate(more) if i]
    path = write(tmp_path / "d.jsonl", data)
    settings = {"on_bad_row": "skip", "max_length": 36}
    whole = make(path, tokenizer, tokenizer_dir, tmp_path / "one", **settings)
    assert 5 < len(whole) < whole.counts["read"]
    monkeypatch.setattr(tokens, "_CHUNK", chunk)
    assert same(make(path, tokenizer, tokenizer_dir, tmp_path / "two", **settings), whole)


def test_memory_does_not_grow_with_the_rows(tmp_path, tokenizer, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(tokens, "_CHUNK", 100)
    peaks = []
    for count in (500, 2500):
        data = [pair_row(f"p{i}", "a" * 200, "b") for i in range(count)]
        path = write(tmp_path / f"{count}.jsonl", data)
        del data
        tracemalloc.start()
        made = make(path, tokenizer, tokenizer_dir, tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(made) == count
    assert len(made.tokens) * 5 > 2 * peaks[1]  # much less than the tokens need
    assert peaks[1] < 1.2 * peaks[0]
