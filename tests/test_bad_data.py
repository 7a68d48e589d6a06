"""Files that cannot be trained on: one sentence with the place and the fix, and nothing is left."""

import gzip
import json

import pytest
from refusals import GOOD, SKIP, pair, rows

pytestmark = pytest.mark.slow  # minutes


def one_row(**columns) -> bytes:
    return json.dumps(pair(**columns)).encode() + b"\n"


# A file's name and bytes -> what is said of it as a whole.
FILES = {
    "empty": ("empty.jsonl", b"", "it holds no rows."),
    "an unknown suffix": (
        "rows.csv",
        b"prompt,chosen,rejected\n",
        "the suffix is none of .jsonl, .ndjson, .json, .parquet, .arrow, .feather, each also with "
        ".gz behind it; convert or rename the file.",
    ),
    "UTF-16": (
        "wide.jsonl",
        one_row().decode().encode("utf-16"),
        "the text is UTF-16; save it as UTF-8.",
    ),
    "one list": (
        "list.jsonl",
        b"[" + one_row() + b"]",
        "the file is one JSON list; rename it to end in .json.",
    ),
    "rows over several lines": (
        "pretty.jsonl",
        json.dumps(GOOD, indent=2).encode(),
        "a row goes over several lines; write a row a line, or one list of rows into a .json file.",
    ),
    "compressed": (
        "packed.jsonl",
        gzip.compress(one_row()),
        "the content is gzip; rename the file to end in .gz.",
    ),
    "compressed and cut short": (
        "short.jsonl.gz",
        gzip.compress(one_row() * 1000)[:-20],
        "this is no whole gzip file (Compressed file ended before the end-of-stream marker was "
        "reached); get it again.",
    ),
    "not compressed": (
        "plain.jsonl.gz",
        one_row(),
        "this is no whole gzip file (Not a gzipped file (b'{\"')); get it again.",
    ),
    "a pointer": (
        "pointer.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "this is a Git LFS pointer, not the data; run `git lfs pull` beside it.",
    ),
    "Parquet by another name": (
        "named.jsonl",
        b"PAR1....PAR1",
        "the content is Parquet; rename the file to end in .parquet.",
    ),
    "Parquet cut short": (
        "short.parquet",
        b"PAR1 and then nothing",
        "this is no whole Parquet file (Parquet magic bytes not found in footer. Either the file "
        "is corrupted or this is not a parquet file); get it again.",
    ),
    "a split that no row has": (
        "splits.jsonl",
        one_row(split="train_sft") + one_row(split="test_sft"),
        "there is no split train; there are test_sft, train_sft: set data.split.",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(root, refusal, name):
    file, content, problem = FILES[name]
    (root / file).write_bytes(content)
    assert refusal(f"--data.path={root / file}") == f"{root / file}: {problem}"


def test_json_that_ends_too_early_names_the_line(root, refusal):
    (root / "list.json").write_text('[\n{"prompt": "one"},\n')
    assert refusal(f"--data.path={root / 'list.json'}") == (
        f"{root / 'list.json'}, line 3: this is not JSON (Expecting value at column 1)."
    )


def test_rows_with_and_without_a_split(root, refusal):
    file = rows(root, pair(split="train"), GOOD, file="uneven.jsonl")
    assert refusal(f"--data.path={file}") == (
        f"{file}, line 2: the row has no `split`, and the first row ({file}, line 1) has one; give "
        f"every row one, or none{SKIP}"
    )


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nowhere.jsonl", "there is no such file or directory."),
        ("nowhere/*.jsonl", "no file matches."),
    ],
)
def test_a_path_that_leads_nowhere(refusal, path, problem):
    told = refusal(f"--data.path={path}", "--model.path=org/none")  # which would be fetched
    assert told == f"data.path={path}: {problem}"


def test_names_that_are_too_long_together_for_one(refusal):
    names = [f"{letter * 200}.jsonl" for letter in "abc"]
    assert refusal(f"--data.path={','.join(names)}") == (
        f"data.path={names[0]}: there is no such file or directory."
    )


def test_a_directory_without_data(root, refusal):
    (root / "bare").mkdir()
    assert refusal(f"--data.path={root / 'bare'}") == (
        f"{root / 'bare'}: the directory holds no data files (.jsonl, .ndjson, .json, .parquet, "
        ".arrow, .feather, or those with .gz), nor does its data/; name the files, such as "
        f"'{root / 'bare'}/*/*.parquet'."
    )


def test_a_saved_dataset_that_is_damaged(root, refusal):
    (root / "saved").mkdir()
    (root / "saved/state.json").write_text("{}")
    sentence = refusal(f"--data.path={root / 'saved'}")
    assert sentence.startswith(f"{root / 'saved/state.json'}: ") and "save it again" in sentence


def test_a_split_that_is_empty_after_filtering(root, refusal):
    file = rows(root, pair(split="train"), pair(split="test"), file="long.jsonl")
    assert refusal(f"--data.path={file}", "--data.max-length=8") == (
        f"{file}: no row is left to train on; the table above says where they went."
    )


def test_held_out_rows_that_are_all_dropped(root, refusal):
    long = rows(root, pair(prompt="word " * 100), file="test.jsonl")
    file = rows(root, GOOD, file="train.jsonl")
    assert refusal(f"--data.path={file}", f"--data.eval-path={long}") == (
        f"{long}: no row is left to evaluate on; the table above says where they went."
    )
    held = pair(prompt="word " * 100, split="test")
    file = rows(root, pair(split="train"), held, file="both.jsonl")
    assert refusal(f"--data.path={file}") == (
        f"{file}: no row is left to evaluate on; the table above says where they went."
    )


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TEMPLATES = {
    "leaves the answers out": (
        "{% for m in messages if m['role'] == 'user' %}" + TEMPLATE.partition("%}")[2],
        "no token of it is trained, because the chat template leaves its answer out, or joins it "
        "into one token with the text around it; change the row, or name another "
        "--model.chat_template",
    ),
    "refuses": (
        "{{ raise_exception('no system turn') }}",
        "the chat template refuses this row (no system turn); change the row, or name another "
        "--model.chat_template",
    ),
    "trims": (
        TEMPLATE.replace("['content']", "['content'] | trim"),
        "`chosen` and `rejected` have the same tokens, so neither is preferred; remove the row, or "
        "change one of them",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_that(root, refusal, name):
    template, problem = TEMPLATES[name]
    (root / "template.jinja").write_text(template)
    file = rows(root, pair(rejected="two "), file="templates.jsonl")
    said = refusal(f"--data.path={file}", f"--model.chat-template={root / 'template.jinja'}")
    assert said == f"{file}, line 1: {problem}{SKIP}"
