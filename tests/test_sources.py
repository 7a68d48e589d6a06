"""What a path names: files, directories, saved datasets and the hub's, and every refusal."""

import json
import os
import re

import datasets
import pytest
from datafiles import ROWS, asking, fake_hub, parquet_bytes, read, refusal, saved_splits, write

from alignjax.config import Data
from alignjax.data import sources
from alignjax.errors import UserError


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def prompts(path, held_out: bool = False, **settings) -> list[str]:
    """The prompts of the rows in the split, none of which may be a problem."""
    rows = read(path, held_out, **settings)
    assert not [row.problem for row in rows if row.problem]
    return [row.values["prompt"] for row in rows if row.in_split]


# What a path names


def test_several_files_are_read_in_the_order_given(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", asking(f"{name}1", f"{name}2"))
    path = f"{tmp_path}/b.jsonl, {tmp_path}/a.jsonl,"
    assert prompts(path) == ["b1", "b2", "a1", "a2"]
    places = [str(row.place) for row in read(path)]
    assert places[2] == f"{tmp_path}/a.jsonl, line 1"
    assert prompts(f"{tmp_path}/*.jsonl") == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert prompts(f"{tmp_path}/[bc].jsonl,{tmp_path}/a.jsonl")[-3:] == ["c2", "a1", "a2"]


def test_glob_reads_below_and_passes_over_directories(tmp_path):
    write(tmp_path / "x" / "deep" / "b.jsonl", asking("b"))
    write(tmp_path / "x" / "a.jsonl", asking("a"))
    (tmp_path / "x" / "c.jsonl").mkdir()
    assert prompts(f"{tmp_path}/**/*.jsonl") == ["a", "b"]


def test_a_name_with_commas_or_brackets_is_a_file_where_it_exists(tmp_path):
    file = write(tmp_path / "a,b[1].jsonl", asking("q"))
    assert prompts(file) == ["q"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "d.jsonl", asking("q"))
    assert prompts("~/d.jsonl") == ["q"]


def test_held_out_rows_come_from_eval_path_whole(tmp_path):
    file = write(tmp_path / "a.jsonl", asking("a"))
    other = write(tmp_path / "b.jsonl", [{"prompt": "b", "split": "x"}, {"prompt": "c"}])
    assert prompts(file, True, eval_path=str(other)) == ["b", "c"]
    # Nothing need be held out of the training rows as well.
    assert prompts(file, False, eval_path=str(other), eval_fraction=1.0) == ["a"]
    data = Data(path=str(file), eval_path=str(other))
    assert (sources.title(data, False), sources.title(data, True)) == (str(file), str(other))
    assert sources.title(Data(path="p"), True) == "p"


def test_path_refusals(tmp_path):
    missing = f"{tmp_path}/none.jsonl"
    assert refusal(missing) == f"data.path={missing}: there is no such file or directory."
    assert refusal("data/none.jsonl") == (
        "data.path=data/none.jsonl: there is no such file or directory."
    )
    file = write(tmp_path / "d.jsonl", asking("q"))
    assert refusal(file, True, eval_path=missing) == (
        f"data.eval_path={missing}: there is no such file or directory."
    )
    assert refusal(f"{file},{missing}") == (
        f"data.path={missing}: there is no such file or directory."
    )
    assert refusal(f"{tmp_path}/*.parquet") == f"data.path={tmp_path}/*.parquet: no file matches."
    assert refusal("~nosuchuser/d.jsonl").startswith("data.path=~nosuchuser/d.jsonl: ")
    assert refusal(" , ") == "data.path is empty: name a file, directory or dataset of rows."


# Directories


@pytest.mark.parametrize("inside", ["", "data"])
def test_directory_of_files_that_name_no_split_is_read_whole(tmp_path, inside):
    write(tmp_path / inside / "helpful.jsonl", asking("h"))
    write(tmp_path / inside / "b.parquet", parquet_bytes(asking("b")))
    write(tmp_path / inside / ".hidden.jsonl", asking("no"))
    write(tmp_path / "README.md", "# no rows")
    write(tmp_path / "dataset_infos.json", "{}")
    assert prompts(tmp_path) == ["b", "h"]
    assert prompts(tmp_path, True) == []
    assert prompts(tmp_path, eval_fraction=1.0) == []
    assert prompts(tmp_path, True, eval_fraction=1.0) == ["b", "h"]


def test_directory_takes_the_files_of_the_split(tmp_path):
    for name in ("train-00001-of-00002", "train-00000-of-00002", "test-00000-of-00001"):
        write(tmp_path / "data" / f"{name}.parquet", parquet_bytes(asking(name[:11])))
    assert prompts(tmp_path) == ["train-00000", "train-00001"]
    assert prompts(tmp_path, True) == ["test-00000-"]
    assert refusal(tmp_path, split="training") == (
        f"{tmp_path}: there is no split training; there are test, train: set data.split."
    )
    assert refusal(tmp_path, True, eval_split="dev") == (
        f"{tmp_path}: there is no split dev; there are test, train: set data.eval_split."
    )


def test_directory_with_the_splits_of_a_hub_dataset(tmp_path):
    for name in ("train_prefs", "test_prefs", "train_sft"):
        write(tmp_path / f"{name}-00000-of-00001-4d7a.jsonl.gz", asking(name))
    settings = dict(split="train_prefs", eval_split="test_prefs")
    assert prompts(tmp_path, **settings) == ["train_prefs"]
    assert prompts(tmp_path, True, **settings) == ["test_prefs"]
    assert refusal(tmp_path) == (
        f"{tmp_path}: there is no split train; there are test_prefs, train_prefs, train_sft: set "
        "data.split."
    )


def test_own_split_takes_every_row(tmp_path):
    """A column of the name `split` has no say where files have it."""
    write(tmp_path / "train.jsonl", [{"prompt": "a", "split": "x"}, {"prompt": "b"}])
    write(tmp_path / "test.jsonl", asking("c") + [{"prompt": "d", "split": "train"}])
    assert prompts(tmp_path) == prompts(tmp_path, eval_fraction=0.5) == ["a", "b"]
    assert prompts(tmp_path, True) == ["c", "d"]


def test_directory_without_the_held_out_split_holds_out_a_share(tmp_path):
    names = [str(i) for i in range(50)]
    write(tmp_path / "train.jsonl", asking(*names))
    write(tmp_path / "validation.jsonl", asking("v"))
    train = prompts(tmp_path, eval_fraction=0.3)
    held_out = prompts(tmp_path, True, eval_fraction=0.3)
    assert sorted(train + held_out) == sorted(names)
    assert 5 <= len(held_out) <= 25  # 15 expected, standard deviation 3.2
    assert prompts(tmp_path, True, eval_fraction=0.3, eval_split="validation") == ["v"]


def test_one_split_alone_is_divided_like_a_file(tmp_path):
    write(tmp_path / "train-00000-of-00001.jsonl", [{"prompt": "a", "split": "train"}])
    assert prompts(tmp_path) == ["a"]
    assert prompts(tmp_path, True) == []


def test_directory_without_data_is_refused(tmp_path):
    write(tmp_path / "readme.txt", "text")
    assert refusal(tmp_path) == (
        f"{tmp_path}: the directory holds no data files (.jsonl, .ndjson, .json, .parquet, .arrow, "
        f".feather, or those with .gz), nor does its data/; name the files, such as "
        f"'{tmp_path}/*/*.parquet'."
    )


def test_files_of_a_directory_that_are_passed_over_are_named(tmp_path):
    names = ("train.jsonl", "test.jsonl", "extra.jsonl", "more.jsonl.zst", "x.csv", "README.md")
    for name in names:
        write(tmp_path / name, [])
    write(tmp_path / "data/train.jsonl", [])
    passed = [
        f"{tmp_path}/{name}" for name in ("data/train.jsonl", "extra.jsonl", "more.jsonl.zst")
    ]
    assert sources.unread(Data(path=str(tmp_path))) == [*passed, f"{tmp_path}/x.csv"]
    assert sources.unread(Data(path=str(tmp_path / "train.jsonl"))) == []


# Saved datasets


def test_saved_dataset(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "d", num_shards=2)
    rows = read(tmp_path / "d")
    assert [row.values for row in rows] == ROWS
    assert str(rows[2].place) == f"{tmp_path}/d, row 3"
    assert len(prompts(tmp_path / "d", eval_fraction=1.0)) == 0
    assert len(prompts(tmp_path / "d", True, eval_fraction=1.0)) == 3


def test_saved_dataset_keeps_python_values_whatever_its_format(tmp_path):
    dataset = datasets.Dataset.from_list([{"prompt": "q", "margin": 0.5}]).with_format("numpy")
    dataset.save_to_disk(tmp_path / "d")
    assert type(read(tmp_path / "d")[0].values["margin"]) is float


def test_saved_dataset_dict(tmp_path):
    directory = saved_splits(tmp_path / "d", train=["a", "b"], test=["c"])
    assert prompts(directory) == ["a", "b"]
    assert prompts(directory, True) == ["c"]
    assert str(read(directory, True)[0].place) == f"{directory}/test, row 1"
    assert refusal(directory, split="all") == (
        f"{directory}: there is no split all; there are train, test: set data.split."
    )


def test_saved_dataset_dict_of_one_split(tmp_path):
    directory = saved_splits(tmp_path / "d", train=[str(i) for i in range(40)])
    assert prompts(directory, True) == []  # a run without held-out rows
    assert refusal(directory, True, eval_split="dev") == (
        f"{directory}: there is no split dev; there is train: set data.eval_split."
    )
    for fraction in (0.0, 0.4):
        assert refusal(directory, True, eval_path=str(directory), eval_fraction=fraction) == (
            f"{directory}: there is no split test; there is train: set data.eval_split."
        )
    assert len(prompts(directory, eval_fraction=0.4, eval_path=str(directory))) == 40
    train = prompts(directory, eval_fraction=0.4)
    held_out = prompts(directory, True, eval_fraction=0.4)
    assert not set(train) & set(held_out)
    assert (len(train) + len(held_out), 0 < len(held_out) < 40) == (40, True)


def test_damaged_saved_dataset(tmp_path):
    directory = saved_splits(tmp_path / "d", train=["a"])
    shard = directory / "train" / "data-00000-of-00001.arrow"
    shard.write_bytes(b"junk")
    assert refusal(directory).startswith(f"{shard}: this is no whole Arrow file (")
    shard.unlink()
    with pytest.raises(UserError, match=f"^{re.escape(str(shard.parent))}/state.json: .*save it "):
        sources.described(Data(path=str(directory)), False)
    for content in ("{", '{"splits": "train"}'):
        (directory / "dataset_dict.json").write_text(content)
        assert refusal(directory).startswith(f"{directory}/dataset_dict.json: ")


# Datasets of a hub


@pytest.fixture
def hub(monkeypatch):
    return fake_hub(monkeypatch)


def test_the_library_still_says_which_splits_there_are(tmp_path):
    """`_load` reads this sentence of the library's; the fake above repeats it."""
    file = write(tmp_path / "d.jsonl", asking("q"))
    with pytest.raises(ValueError) as caught:
        datasets.load_dataset(
            "json",
            data_files={"train": str(file), "val": str(file)},
            split="test",
            cache_dir=tmp_path,
        )
    assert str(caught.value) == "Unknown split \"test\". Should be one of ['train', 'val']."


def test_hub_dataset(hub):
    held, asked = hub
    held["org/name", None, "train"] = ["a", "b"]
    held["org/name", None, "test"] = ["c"]
    held["org/name", "sub", "train"] = ["d"]
    assert prompts("org/name") == ["a", "b"]
    assert prompts("org/name", True) == ["c"]
    assert prompts("org/name:sub, org/name") == ["d", "a", "b"]
    assert str(read("org/name")[1].place) == "org/name, split train, row 2"
    assert asked[:2] == [("org/name", None, "train"), ("org/name", None, "test")]


def test_hub_splits(hub):
    held, _ = hub
    held["org/name", None, "train"] = [str(i) for i in range(40)]
    assert prompts("org/name", True) == []
    assert len(prompts("org/name", eval_fraction=0.4, eval_path="org/other")) == 40
    assert hub[1][-1] == ("org/name", None, "train")  # whether there is a test split is no matter
    train = prompts("org/name", eval_fraction=0.4)
    held_out = prompts("org/name", True, eval_fraction=0.4)
    assert not set(train) & set(held_out)
    assert (len(train) + len(held_out), 0 < len(held_out) < 40) == (40, True)
    held["org/name", None, "test"] = ["t"]
    assert len(prompts("org/name", eval_fraction=0.4)) == 40
    assert prompts("org/name", True, eval_fraction=0.4) == ["t"]
    for fraction in (0.0, 0.4):
        assert refusal("org/name", split="all", eval_fraction=fraction) == (
            "org/name: there is no split all; there are train, test: set data.split."
        )
    assert refusal("org/name", True, eval_split="dev") == (
        "org/name: there is no split dev; there are train, test: set data.eval_split."
    )


def test_hub_refusals(hub):
    assert refusal("org/none") == (
        "data.path=org/none: there is no such file here, and the hub's dataset does not load "
        "(Dataset 'org/none' doesn't exist)."
    )
    hub[0]["org/name", None, "train"] = []
    assert refusal("org/name") == "org/name, split train: it holds no rows."


def test_hub_without_network_is_one_sentence():
    sentence = refusal("no-such-org/no-such-dataset")
    assert re.fullmatch(
        r"data\.path=no-such-org/no-such-dataset: there is no such file here, and the hub's "
        r"dataset does not load \([^\n]+\)\.",
        sentence,
    )


# What leads elsewhere or has no end


@pytest.mark.parametrize("name", ["../e/{}", "{}/../../e/{}", "/absolute/{}", "none.arrow", ""])
def test_a_saved_dataset_names_files_of_its_own(tmp_path, name):
    for directory in ("d", "e"):
        datasets.Dataset.from_list(asking("q")).save_to_disk(tmp_path / directory)
    state = tmp_path / "d" / "state.json"
    shard = "data-00000-of-00001.arrow"
    file = name.format(shard, shard).replace("/absolute", str(tmp_path / "e"))
    state.write_text(json.dumps({"_data_files": [{"filename": file}]}))
    for look in (refusal, lambda path: str(digest_error(path))):
        assert look(tmp_path / "d").startswith(f"{state}: ")


def digest_error(path) -> UserError:
    with pytest.raises(UserError) as caught:
        sources.described(Data(path=str(path)), False)
    return caught.value


def test_pipes_and_devices_are_refused_and_links_to_files_are_not(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "link.jsonl").symlink_to(write(tmp_path / "real.jsonl", asking("q")))
    for name in ("pipe", "zero"):
        sentence = refusal(tmp_path / f"{name}.jsonl")
        assert sentence.startswith(f"data.path={tmp_path}/{name}.jsonl: ")
    assert prompts(tmp_path / "link.jsonl") == ["q"]


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "train.parquet"),
        ("train.jsonl", "train.jsonl.gz"),
        ("train-00000-of-00001.jsonl", "train.jsonl"),
        ("train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"),
        ("rows.jsonl", "rows.json", "more.jsonl"),
    ],
)
def test_a_directory_that_holds_the_same_rows_twice_is_refused(tmp_path, names):
    for name in names:
        write(tmp_path / name, asking("q"))
    assert refusal(tmp_path).startswith(f"{tmp_path}: ") and names[0] in refusal(tmp_path)
    write(tmp_path / "test.jsonl", asking("t"))
    if "train" in names[0]:
        assert prompts(tmp_path, True) == ["t"]


def test_splits_may_be_numbers(tmp_path):
    file = write(tmp_path / "d.jsonl", [{"prompt": str(i), "split": i % 2} for i in range(4)])
    assert prompts(file, split="0") == ["0", "2"]
    assert prompts(file, True, eval_split="1") == ["1", "3"]
    assert "there are 0, 1" in refusal(file)
    file = write(tmp_path / "e.jsonl", [{"prompt": "a", "split": ["train"]}])
    (row,) = read(file)
    assert (row.values, row.in_split) == (None, True) and "split=['train']" in row.problem
    file = write(tmp_path / "f.jsonl", [{"prompt": "a", "split": "x\n{}%s[red]"}])
    assert "there is x\\n{}%s[red]" in refusal(file)
