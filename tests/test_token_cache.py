"""The cache of tokens on disk: made once, and made anew when anything changes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tokenizer
from tokencases import PAIRS, make, pair_row, same, sequences, tokenizer_text, write

from alignjax.config import Data
from alignjax.data import chat, tokens


def forbid_tokenizing(monkeypatch):
    def refuse(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(tokens, "encode_sides", refuse)


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
    make(path, tokenizer, tokenizer_dir, tmp_path / "cache")
    made = make(path, tokenizer, tokenizer_dir, tmp_path / "cache", **settings)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2
    assert same(made, make(path, tokenizer, tokenizer_dir, tmp_path / "another", **settings))


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
    assert len(list((cache / "tokens").iterdir())) == 1


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
    assert len(list((cache / "tokens").iterdir())) == 1
    assert same(made, make(path, tokenizer, tokenizer_dir, tmp_path / "another"))


def test_a_file_that_changes_while_it_is_tokenized_is_refused_and_not_kept(
    tmp_path, tokenizer, tokenizer_dir
):
    path, cache = tmp_path / "d.jsonl", tmp_path / "cache"
    write(path, PAIRS)
    before = path.read_bytes()

    def grow(_) -> None:
        path.write_bytes(path.read_bytes() + before)

    arguments = ("dpo", False, tokenizer, tokenizer_dir, cache)
    with pytest.raises(ValueError, match=f"^{path}: it changed while it was tokenized.*again"):
        tokens.token_set(Data(path=str(path)), *arguments, grow)
    assert not any((cache / "tokens").iterdir())
    path.write_bytes(before)
    assert len(make(str(path), tokenizer, tokenizer_dir, cache)) == len(PAIRS)


def test_a_date_is_part_of_the_key_where_the_template_writes_one(tmp_path, tokenizer_dir):
    path, template = write(tmp_path / "d.jsonl", PAIRS), tmp_path / "t.jinja"
    for form, shared in (("%d %b %Y", [0, 0, 2]), ("%H:%M", [0, 1, 0]), ("%Y", [0, 0, 0])):
        today = "{{ '<|im_start|>system\n' + strftime_now('" + form + "') + '<|im_end|>\n' }}"
        template.write_text(today + (tokenizer_dir / "chat_template.jinja").read_text())
        made = []
        for time in (datetime(2026, 1, 30, 9), datetime(2026, 1, 30, 10), datetime(2026, 1, 31, 9)):
            tokenizer = chat.load_tokenizer(tokenizer_dir, str(template), time)
            made.append(make(path, tokenizer, tokenizer_dir, tmp_path / "cache"))
            assert time.strftime(form) in tokenizer_text(made[-1], tokenizer, 0)
        assert [[one.key for one in made].index(one.key) for one in made] == shared


@pytest.mark.parametrize("name", ["tokenizer.4.0.0.json", "tekken.json", "spiece.model"])
def test_any_file_of_a_tokenizer_is_part_of_the_key(tmp_path, tokenizer, tokenizer_dir, name):
    path = write(tmp_path / "d.jsonl", PAIRS)
    model = shutil.copytree(tokenizer_dir, tmp_path / "model")
    for content in (None, "one", "other"):
        if content:
            (model / name).write_text(content)
        make(path, tokenizer, model, tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 3


def test_the_key_tells_tokens_that_another_library_made(
    tmp_path, tokenizer, tokenizer_dir, monkeypatch
):
    path = write(tmp_path / "d.jsonl", PAIRS)
    first = make(path, tokenizer, tokenizer_dir, tmp_path / "one")
    assert make(path, tokenizer, tokenizer_dir, tmp_path / "two").key == first.key
    tokenizer.add_tokens(["ec"])
    assert make(path, tokenizer, tokenizer_dir, tmp_path / "three").key != first.key
