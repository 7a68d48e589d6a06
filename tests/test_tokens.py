"""Tokens on disk: made once, made anew when anything changes, every row accounted for."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tokenizer
from tokencases import PAIRS, make, pair_row, sequences, sft_row, tokenizer_text, write

from alignjax.config import Data
from alignjax.data import chat, rows, tokens
from alignjax.data.columns import Side
from alignjax.data.formats import Place
from alignjax.data.tokenset import TokenSet


def encoded(tokenizer, *sides: Side) -> list[tuple[list[int], list[bool]]]:
    found = chat.encode_sides(tokenizer, [(side, "") for side in sides], "all")
    return [(ids.tolist(), mask.tolist()) for ids, mask in found]


def same(one: TokenSet, other: TokenSet) -> bool:
    """Whether all is equal but where the bad rows are listed."""
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(TokenSet)
        if field.name != "bad_rows_file"
    )


def forbid_tokenizing(monkeypatch):
    def refuse(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(tokens, "encode_sides", refuse)


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


def test_second_time_nothing_is_tokenized(tmp_path, tokenizer, tokenizer_dir, monkeypatch):
    path = write(tmp_path / "d.jsonl", PAIRS)
    first = make(path, tokenizer, tokenizer_dir, tmp_path / "cache")
    forbid_tokenizing(monkeypatch)
    second = make(path, tokenizer, tokenizer_dir, tmp_path / "cache")
    assert same(second, first)
    assert isinstance(second.tokens, np.memmap)
    with pytest.raises(AssertionError, match="tokenized again"):
        make(path, tokenizer, tokenizer_dir, tmp_path / "another cache")


def test_touching_or_moving_the_file_keeps_the_cache(
    tmp_path, tokenizer, tokenizer_dir, monkeypatch
):
    first = make(write(tmp_path / "d.jsonl", PAIRS), tokenizer, tokenizer_dir, tmp_path / "cache")
    forbid_tokenizing(monkeypatch)
    moved = write(tmp_path / "moved.jsonl", PAIRS)
    again = make(moved, tokenizer, tokenizer_dir, tmp_path / "cache")
    assert again.key == first.key
    assert [first.place(0), again.place(0)] == [f"{tmp_path}/d.jsonl, line 1", f"{moved}, line 1"]


def test_bad_rows_of_a_moved_file_are_listed_in_its_present_place(
    tmp_path, tokenizer, tokenizer_dir
):
    content = [*PAIRS, {"prompt": "p"}]
    for name in ("d.jsonl", "moved.jsonl"):
        path = write(tmp_path / name, content)
        made = make(path, tokenizer, tokenizer_dir, tmp_path / "cache", on_bad_row="skip")
        (line,) = made.bad_rows_file.read_text().splitlines()
        assert json.loads(line)["place"] == f"{path}, line {len(content)}"


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
        {"overlong": "split"},
        {"on_bad_row": "skip"},
        {"eval_fraction": 0.5},
        {"split": "other"},
    ],
)
def test_another_setting_is_another_cache(tmp_path, tokenizer, tokenizer_dir, settings):
    data = [row | {"split": split} for row in PAIRS for split in ("train", "other")]
    path = write(tmp_path / "d.jsonl", data)
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


def test_held_out_rows_and_stages_have_their_own_cache(tmp_path, tokenizer, tokenizer_dir):
    data = [row | {"split": "test" if i == 1 else "train"} for i, row in enumerate(PAIRS)]
    path = write(tmp_path / "d.jsonl", [row | {"completion": "c"} for row in data])
    train = make(path, tokenizer, tokenizer_dir, tmp_path)
    held_out = make(path, tokenizer, tokenizer_dir, tmp_path, held_out=True)
    sft = make(path, tokenizer, tokenizer_dir, tmp_path, "sft")
    assert (train.lines.tolist(), held_out.lines.tolist()) == ([1, 3], [2])
    assert (sft.sides, sft.lines.tolist()) == (1, [1, 3])
    assert train.counts == sft.counts == {"read": 2, "in other splits": 1, "kept": 2}
    assert held_out.counts == {"read": 1, "in other splits": 2, "kept": 1}
    assert len({train.key, held_out.key, sft.key}) == 3


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


WRITE = """
import os, signal, sys
from pathlib import Path
from alignjax.config import Data
from alignjax.data import chat, tokens

path, tokenizer_dir, cache, end = sys.argv[1:]
tokens._CHUNK = 2

def progress(done):
    if done == 2 and end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)

tokenizer = chat.load_tokenizer(Path(tokenizer_dir))
if end == "together":
    print("ready", flush=True)
    sys.stdin.readline()
arguments = (Data(path=path), "dpo", False, tokenizer, Path(tokenizer_dir), Path(cache))
print(len(tokens.token_set(*arguments, progress)))
"""


def writing(path: str, tokenizer_dir: Path, cache: Path, end: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITE, path, str(tokenizer_dir), str(cache), end]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def test_a_killed_process_leaves_no_half_cache(tmp_path, tokenizer, tokenizer_dir):
    path, cache = write(tmp_path / "d.jsonl", PAIRS), tmp_path / "cache"
    killed = writing(path, tokenizer_dir, cache, "killed")
    assert (killed.communicate()[0], killed.returncode) == ("", -signal.SIGKILL)
    [left] = (cache / "tokens").iterdir()
    assert left.name.endswith(".partial")
    assert (left / "tokens.bin").is_file()
    made = make(path, tokenizer, tokenizer_dir, cache)
    assert same(made, make(path, tokenizer, tokenizer_dir, tmp_path / "another"))
    assert [entry.name for entry in (cache / "tokens").iterdir()] == [made.key]


def test_processes_that_write_the_same_cache_at_one_time(tmp_path, tokenizer, tokenizer_dir):
    data = [pair_row(f"p{i}", "a" * 100, "b") for i in range(300)]
    path, cache = write(tmp_path / "d.jsonl", data), tmp_path / "cache"
    both = [writing(path, tokenizer_dir, cache, "together") for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in both] == ["300\n"] * 2
    made = make(path, tokenizer, tokenizer_dir, cache)
    assert [entry.name for entry in (cache / "tokens").iterdir()] == [made.key]
    assert same(made, make(path, tokenizer, tokenizer_dir, tmp_path / "another"))
