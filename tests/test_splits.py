"""How rows divide into splits, and the digest of what is read."""

import re
from pathlib import Path

import datasets
import pytest
from conftest import SHARED_DATA
from datafiles import asking, fake_hub, read, refusal, saved_splits, write
from rowcases import assistant, said, user

from alignjax.config import Data
from alignjax.data import sources, splits


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def hub(monkeypatch):
    return fake_hub(monkeypatch)


# Splits


def both_splits(file: Path, rows: list[dict], fraction: float) -> tuple[list[int], list[int]]:
    """Line numbers of the training and of the held-out rows."""
    write(file, rows)
    return tuple(
        [row.place.number for row in read(file, held_out, eval_fraction=fraction) if row.in_split]
        for held_out in (False, True)
    )


def test_split_column_decides(tmp_path):
    data = [{"prompt": str(i), "split": ("train", "test", "other")[i % 3]} for i in range(9)]
    file = tmp_path / "d.jsonl"
    assert both_splits(file, data, 0.5) == ([1, 4, 7], [2, 5, 8])
    rows = read(file, True, eval_split="other")
    assert [row.place.number for row in rows if row.in_split] == [3, 6, 9]
    assert len(rows) == 9
    assert refusal(file, split="all") == (
        f"{file}: there is no split all; there are other, test, train: set data.split."
    )
    assert refusal(file, True, eval_split="dev") == (
        f"{file}: there is no split dev; there are other, test, train: set data.eval_split."
    )


def test_no_held_out_rows_where_the_column_names_none(tmp_path):
    data = [{"prompt": "a", "split": "train"}]
    assert both_splits(tmp_path / "d.jsonl", data, 0.5) == ([1], [])


def test_the_first_row_decides_and_others_must_follow(tmp_path):
    file = write(tmp_path / "a.jsonl", b'nonsense\n{"prompt": "a", "split": "train"}\n')
    other = write(tmp_path / "b.jsonl", [{"prompt": "b"}, {"prompt": "c", "split": None}])
    sentence = (
        f"{{}}: the row has no `split`, and the first row ({file}, line 2) has one; give every row "
        "one, or none."
    )
    rows = read(f"{file},{other}")
    assert [row.problem for row in rows[2:]] == [
        sentence.format(f"{other}, line 1"),
        sentence.format(f"{other}, line 2"),
    ]
    assert [(row.values is None, row.in_split) for row in rows] == [
        (True, True),
        (False, True),
        (True, True),
        (True, True),
    ]
    assert [row.in_split for row in read(f"{file},{other}", True)] == [False] * 4
    rows = read(f"{other},{file}")
    assert [row.problem for row in rows[3:]] == [
        f"{file}, line 2: the row has a `split`, and the first row ({other}, line 1) has none; "
        "give every row one, or none."
    ]


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 1.0])
def test_hashed_split_is_disjoint_complete_and_of_the_right_size(tmp_path, fraction):
    data = [{"prompt": f"question {i}"} for i in range(4000)]
    train, held_out = both_splits(tmp_path / "d.jsonl", data, fraction)
    assert sorted(train + held_out) == list(range(1, 4001))
    spread = 4 * (fraction * (1 - fraction) * 4000) ** 0.5  # four standard deviations
    assert abs(len(held_out) - 4000 * fraction) <= spread


@pytest.mark.parametrize(
    "make",
    [
        lambda prompt, i: {"prompt": prompt, "chosen": f"a{i}", "rejected": f"b{i}"},
        lambda prompt, i: {"prompt": [user(prompt)], "chosen": f"a{i}", "rejected": "b"},
        lambda prompt, i: {"messages": [user(prompt), assistant(f"a{i}")]},
        lambda prompt, i: {
            "chosen": [user(prompt), assistant(f"a{i}")],
            "rejected": [user(prompt), assistant(f"b{i}")],
        },
        lambda prompt, i: {"chosen": f"{prompt}? a{i}", "rejected": f"{prompt}? b{i}"},
        lambda prompt, i: {"conversations": [said("human", prompt), said("gpt", f"a{i}")]},
        lambda prompt, i: {"conversations": [said("human", prompt), said("chatgpt", f"{i}")]},
        lambda prompt, i: {
            "conversations": [said("human", prompt)],
            "chosen": said("gpt", f"a{i}"),
            "rejected": said("gpt", f"b{i}"),
        },
        lambda prompt, i: {"instruction": "Say.", "input": prompt, "output": f"a{i}"},
        lambda prompt, i: {"instruction": prompt, "chosen": f"a{i}", "rejected": f"b{i}"},
        lambda prompt, i: {"instruction": "", "input": prompt, "output": f"a{i}"},
        lambda prompt, i: {"text": prompt},
        lambda prompt, i: {"prompt": "", "completion": prompt},
        lambda prompt, i: {"chosen": prompt[::-1], "rejected": f"!{i}"},
        lambda prompt, i: {
            "instruction": f"later {i}" if i % 3 else prompt,
            "history": [[prompt, "a"]] if i % 3 else [],
            "output": f"a{i}",
        },
    ],
)
def test_rows_of_one_prompt_fall_together(tmp_path, make):
    data = [make(f"question {i // 3}", i) for i in range(600)]
    sides = [
        {(line - 1) // 3 for line in part} for part in both_splits(tmp_path / "d.jsonl", data, 0.3)
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 200
    assert 30 <= len(sides[1]) <= 90  # 60 expected, standard deviation 6.5


def test_hashed_split_is_the_same_in_every_process_and_order(tmp_path):
    data = [{"prompt": f"question {i}"} for i in range(40)]
    _, held_out = both_splits(tmp_path / "d.jsonl", data, 0.2)
    _, backwards = both_splits(tmp_path / "e.jsonl", data[::-1], 0.2)
    assert [41 - line for line in backwards[::-1]] == held_out
    # Those where the first 8 bytes of sha256('"question I"') are below 2^64 / 5.
    assert held_out == [line + 1 for line in (15, 19, 21, 22, 36, 39)]


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ({"prompt": "why?", "chosen": "a", "rejected": "b"}, 0.8409157841579452),
        (
            {"prompt": [user("q"), assistant("x"), user("r")], "completion": "a"},
            0.3989023261800105,
        ),
        ({"messages": [user("q"), assistant("a"), user("r")]}, 0.3989023261800105),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            0.8236471133888811,
        ),
        ({"chosen": "Q: why? A: so", "rejected": "Q: why? A: no"}, 0.45033419388587204),
    ],
)
def test_hash_keeps_its_values(row, value):
    """A change would move rows between training and held-out data of runs that exist."""
    assert splits.hash01(row) == value


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ["q"]},
        {"prompt": ["q"]},
        {"chosen": [3], "rejected": [4]},
        {"conversations": [{"from": ["human"]}, None]},
        {"instruction": 5, "history": [[1]]},
        {},
    ],
)
def test_malformed_row_survives_the_split_to_be_refused_with_its_place(tmp_path, row):
    train, held_out = both_splits(tmp_path / "d.jsonl", [row], 0.5)
    assert train + held_out == [1]


# The digest


def digest(path, held_out: bool = False, **settings) -> str:
    return sources.described(Data(path=str(path), **settings), held_out)[0]


def test_digest_changes_with_content_order_and_format_alone(tmp_path):
    a = write(tmp_path / "a.jsonl", asking("a"))
    b = write(tmp_path / "b.jsonl", asking("b"))
    first = digest(f"{a},{b}")
    assert re.fullmatch("[0-9a-f]{64}", first)
    copies = (
        write(tmp_path / "x" / "c.jsonl", asking("a")),
        write(tmp_path / "d.ndjson", asking("b")),
    )
    assert digest("{},{}".format(*copies)) == first
    assert digest(f"{a},{b}", split="other", eval_fraction=0.5) == first
    as_json = write(tmp_path / "e.json", asking("b"))
    others = [digest(f"{b},{a}"), digest(a), digest(f"{a},{b},{b}"), digest(f"{a},{as_json}")]
    write(b, asking("B"))
    others.append(digest(f"{a},{b}"))
    assert len({first, *others}) == 6


def test_digest_follows_the_split_of_the_source(tmp_path, hub):
    write(tmp_path / "d" / "train.jsonl", asking("a"))
    alone = digest(tmp_path / "d")
    write(tmp_path / "d" / "test.jsonl", asking("a"))
    # The same bytes, but every row is in, whatever its `split` column says.
    assert digest(tmp_path / "d") == digest(tmp_path / "d", True) != alone
    saved = saved_splits(tmp_path / "s", train=["a"], test=["b"])
    first = digest(saved)
    assert len({first, digest(saved, True)}) == 2
    assert digest(saved_splits(tmp_path / "t", train=["a"], test=["c"])) == first
    assert digest(saved_splits(tmp_path / "u", train=["c"])) != first
    held, _ = hub
    held["org/name", None, "train"] = ["a"]
    held["org/name", None, "test"] = ["b"]
    held["org/same", None, "train"] = held["org/same", None, "train[:1]"] = ["a"]
    assert digest("org/name") == digest("org/same")
    assert digest("org/name") != digest("org/name", True)
    assert digest("org/same") != digest("org/same", split="train[:1]")
    held["org/name", None, "train"] = ["A"]
    assert digest("org/name") != digest("org/same")


def test_digest_refuses_what_cannot_be_read(tmp_path):
    with pytest.raises(
        ValueError, match=r"^data\.path=none: there is no such file or directory\.$"
    ):
        digest("none")


# Real files


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("ultrafeedback_sample", 994, 199),
        ("hh_rlhf_sample", 2000, 500),
        ("alpaca_eval_prefs", None, None),
        ("dolly_sft_sample", 2981, 0),
    ],
)
def test_real_files(name, train, test):
    file = SHARED_DATA / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"there is no {file}")
    rows = read(file)
    held_out = [row for row in read(file, True) if row.in_split]
    assert not [row.problem for row in rows if row.problem]
    counts = sum(row.in_split for row in rows), len(held_out)
    assert counts == (train, test) if train else sum(counts) == 3889
