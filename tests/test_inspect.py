"""What `alignjax.inspect` shows is what training takes: its tokens, its rows, its first loss."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED_DATA, mesh, tiny_config, write_model
from running import ROOT, arguments, environment
from tokencases import pair_row, sft_row, write

from alignjax import command, inspect
from alignjax import config as configs
from alignjax.inspection import contents as shown
from alignjax.inspection.page import page
from alignjax.inspection.pieces import token_reader, visible
from alignjax.run import planned

TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two\nlines"},
    {"role": "assistant", "content": "<script>alert('last')</script>"},
]
ROWS = {
    "sft": [{"messages": TURNS}, sft_row("why", "so"), sft_row("how", "thus & so")],
    "dpo": [pair_row("<b>why</b>", "because", "no"), pair_row("how", "so", "<script>x</script>")],
}
ROWS["rm"] = ROWS["dpo"]
HEADER, END = "<|im_start|>assistant\n", "<|im_end|>"


@pytest.fixture(autouse=True)
def untraced(monkeypatch):
    monkeypatch.delenv("ALIGNJAX_TRACEBACK", raising=False)


def overrides(root: Path, run: Path, stage: str, *more: str) -> list[str]:
    return arguments(root, str(run), *more, stage=stage)[3:]


def ended(monkeypatch, capsys, root: Path, run: Path, *more: str, stage="dpo") -> tuple:
    """Exit code of the command in this process, what it printed, and what it said to stderr."""
    monkeypatch.setenv("ALIGNJAX_CACHE", str(root / "cache"))
    monkeypatch.setattr("sys.argv", ["inspect", *overrides(root, run, stage, *more)])
    capsys.readouterr()
    code = command.run(inspect.main)
    return code, *capsys.readouterr()


def contents_of(root: Path, tmp_path: Path, stage: str, rows: int = 9, **data) -> shown.Contents:
    file = write(tmp_path / "hand.jsonl", ROWS[stage])
    more = [f"--data.path={file}", f"--data.cache-dir={tmp_path / 'cache'}", "--batch.epochs=1"]
    more += [f"--data.{key}={value}" for key, value in data.items()]
    arguments = overrides(root, tmp_path / "run", stage, *more)
    return shown.contents(planned(configs.parse("alignjax.inspect", arguments)), rows)


def marked(sequence: shown.Sequence) -> str:
    """The text of a sequence with what is trained in brackets; its line breaks without marks."""
    parts = [f"[{t.text}]" if t.trained else t.text for t in sequence.tokens]
    return "".join(parts).replace("][", "").replace("⏎", "")


def by_line(found: shown.Contents) -> dict[str, shown.Sequence]:
    """Of the packed rows: "hand.jsonl, line 1" with the side -> its sequence."""
    sequences = [one for row in found.rows for one in row.sequences]
    return {f"{Path(one.place).name}{one.side()}": one for one in sequences}


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_the_turns_that_are_trained_are_marked(root, tmp_path, train_on):
    found = by_line(contents_of(root, tmp_path, "sft", train_on=train_on))
    assert set(found) == {f"hand.jsonl, line {i}" for i in (1, 2, 3)}
    first = f"[first{END}]" if train_on == "all" else f"first{END}"
    assert marked(found["hand.jsonl, line 1"]) == (
        f"<|im_start|>user\none{END}\n{HEADER}{first}\n<|im_start|>user\ntwo\nlines{END}\n"
        f"{HEADER}[<script>alert('last')</script>{END}]\n"
    )
    assert marked(found["hand.jsonl, line 2"]) == (
        f"<|im_start|>user\nwhy{END}\n{HEADER}[so{END}]\n"
    )


def test_the_sides_of_pairs_are_told_apart(root, tmp_path):
    found = contents_of(root, tmp_path, "dpo")
    sequences = by_line(found)
    ends = {name: marked(one).partition(HEADER)[2] for name, one in sequences.items()}
    assert ends == {
        "hand.jsonl, line 1chosen": f"[because{END}]\n",
        "hand.jsonl, line 1rejected": f"[no{END}]\n",
        "hand.jsonl, line 2chosen": f"[so{END}]\n",
        "hand.jsonl, line 2rejected": f"[<script>x</script>{END}]\n",
    }
    segments = [one.segment for row in found.rows for one in row.sequences]
    assert segments == [1, 2, 3, 4]
    assert [one.side() for one in found.extremes[1].sequences] == ["chosen", "rejected"]
    assert [row.sequences[0].place[-6:] for row in found.extremes] == ["line 1", "line 2"]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_what_is_marked_is_what_the_batches_train(root, tmp_path, stage):
    file = write(tmp_path / "hand.jsonl", ROWS[stage])
    unit = "sequences" if stage == "sft" else "pairs"
    more = (f"--data.path={file}", f"--batch.{unit}=2", "--batch.rows-per-device=2")
    more += (f"--data.cache-dir={tmp_path / 'cache'}",)
    run = planned(
        configs.parse("alignjax.inspect", overrides(root, tmp_path / "run", stage, *more))
    )
    rows = list(shown.packed_rows(run, token_reader(run.tokenizer)))
    at = 0
    for step in range(len(run.steps)):
        batch = run.steps[step]
        for i in range(int(np.diff(run.steps.plan.steps)[step])):
            micro, row = divmod(i, run.rows)
            targets = batch.targets[micro, row]
            tokens = [t for one in rows[at].sequences for t in one.tokens]
            places = [place for place, token in enumerate(tokens) if token.trained]
            assert places == targets[targets > 0].tolist()
            assert [t.id for t in tokens] == batch.tokens[micro, row, : len(tokens)].tolist()
            assert [t.position for t in tokens] == batch.positions[
                micro, row, : len(tokens)
            ].tolist()
            assert len(tokens) + rows[at].padding == run.steps.plan.row_length
            at += 1
    assert at == len(rows) == len(run.steps.plan.rows) - 1


def test_histograms_count_every_sequence(root, tmp_path):
    found = contents_of(root, tmp_path, "sft")
    lengths, trained_tokens = found.histograms
    sequences = by_line(found).values()
    for histogram, values in (
        (lengths, [len(one.tokens) for one in sequences]),
        (trained_tokens, [sum(t.trained for t in one.tokens) for one in sequences]),
    ):
        counts = histogram.counts["sequences"]
        bins = zip(histogram.edges, histogram.edges[1:], strict=False)
        assert counts.tolist() == [sum(low <= v < high for v in values) for low, high in bins]
        assert counts.sum() == 3 and len(counts) <= shown.BINS


def test_the_page_is_whole_escaped_and_loads_nothing(root, tmp_path):
    found = contents_of(root, tmp_path, "sft")
    text = page(found, None)
    tree = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    assert "script" not in {node.tag for node in tree.iter()}
    assert not re.search(r"""(src|href|action)\s*=|url\(|@import|https?:|//""", text)
    spans = [node for node in tree.iter("span") if node.get("data-about")]
    tokens = [t for row in [*found.rows, *found.extremes] for s in row.sequences for t in s.tokens]
    assert [node.text for node in spans] == [t.text for t in tokens]
    assert [node.get("class") == "t on" for node in spans] == [t.trained for t in tokens]
    first = found.rows[0].sequences[0].tokens[0]
    about = f"id {first.id} · position 0 · segment 1 · not trained"
    assert spans[0].get("data-about") == about
    assert "".join(t.text for t in tokens).count("<script>") >= 1


def test_without_the_loss_no_weights_are_needed(monkeypatch, capsys, root, tmp_path):
    model = tmp_path / "model"
    write_model(model, tiny_config())
    (model / "model.safetensors").unlink()
    html = tmp_path / "pages" / "one.html"
    more = (f"--model.path={model}", "--skip-loss", f"--html={html}", "--rows=1", "--mesh.fsdp=64")
    code, out, err = ended(monkeypatch, capsys, root, tmp_path / "run", *more)
    assert (code, err) == (0, "")
    assert out.endswith(f"wrote {html}\n") and html.is_file() and not (tmp_path / "run").exists()
    assert "first batch" not in out and out.count("step 1, row") == 1
    assert "⟦" in out and "\x1b" not in out  # no terminal: brackets, no colour


def test_a_run_that_is_going_on_is_left_as_it_is(monkeypatch, capsys, root, tmp_path):
    from alignjax import lock

    run = tmp_path / "run"
    with lock.held(run):
        (run / "config.json").write_text("{}")
        before = {file.name: file.read_bytes() for file in run.iterdir()}
        code, _, err = ended(monkeypatch, capsys, root, run, "--skip-loss")
        after = {file.name: file.read_bytes() for file in run.iterdir()}
    assert (code, err) == (0, "")
    assert after.pop("inspect.html") and after == before


def test_rows_that_were_skipped_are_told(monkeypatch, capsys, root, tmp_path):
    bad = [{"prompt": "x", "chosen": "y"}] * (shown.BAD_ROWS + 2)
    file = write(tmp_path / "bad.jsonl", ROWS["dpo"] + bad)
    more = (f"--data.path={file}", "--data.on-bad-row=skip", "--skip-loss")
    _, out, _ = ended(monkeypatch, capsys, root, tmp_path / "run", *more)
    assert out.count("skipped  ") == shown.BAD_ROWS + 1
    assert f"skipped  {file}, line 3: " in out and "and 2 more, listed in " in out


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--rows=-1", "rows=-1: it must be at least 0 and at most 2147483647."),
        ("--html=page.txt", "--html=page.txt: name a file that ends in .html."),
        ("--data.path=none.jsonl", "data.path=none.jsonl: there is no such file or directory."),
    ],
)
def test_bad_input_is_one_sentence(monkeypatch, capsys, root, tmp_path, option, sentence):
    code, _, err = ended(monkeypatch, capsys, root, tmp_path / "run", option)
    assert (code, err) == (2, f"error: {sentence}\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_page_replaces_nothing_else(monkeypatch, capsys, root, tmp_path, kind):
    page = tmp_path / "a.html"
    page.mkdir() if kind == "directory" else page.write_text("<html>mine")
    code, _, said = ended(monkeypatch, capsys, root, tmp_path / "run", f"--html={page}")
    assert code == 2 and said.startswith(f"error: {page}: ") and said.count("\n") == 1
    assert "name another place" in said
    assert kind == "directory" or page.read_text() == "<html>mine"


def test_an_unknown_option_lists_its_own_too(monkeypatch, capsys, root, tmp_path):
    code, _, err = ended(monkeypatch, capsys, root, tmp_path / "run", "--row=2")
    assert code == 2 and "error: --row: there is no such key; there are " in err
    assert {"rows,", "html,", "skip_loss,"} <= set(err.split())


def launched(root: Path, tmp_path: Path, **env: str) -> str:
    line = [sys.executable, "-m", "alignjax.inspect", *overrides(root, tmp_path / "run", "dpo")]
    env = environment(root / "cache") | env
    done = subprocess.run(
        [*line, "--skip-loss"], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_colour_goes_to_what_takes_it(root, tmp_path):
    """Colour is asked for as a terminal's would be; NO_COLOR takes it away again."""
    coloured = launched(root, tmp_path, FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[1;32m" in coloured and "⟦" not in coloured
    plain = launched(root, tmp_path, FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1")
    assert "⟦" in plain and "\x1b[1;32m" not in plain


def test_help_has_the_options_and_the_keys():
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1"}
    line = [sys.executable, "-X", "importtime", "-m", "alignjax.inspect", "--config=sft_smollm2"]
    done = subprocess.run([*line, "--help"], env=env, capture_output=True, text=True, check=True)
    assert "--rows INT" in done.stdout and "packed rows to show (default: 3)" in done.stdout
    assert "--skip-loss" in done.stdout and "--batch.sequences INT" in done.stdout
    assert not re.search(r"\| +(jax|transformers|rich\.table)$", done.stderr, re.M)


def test_bytes_of_a_character_are_shown_until_it_is_whole(tmp_path):
    """In byte-level BPE and in SentencePiece's bytes alike."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    level.decoder = decoders.ByteLevel()
    pieces = {"<unk>": 0, "▁a": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    metaspace = Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    metaspace.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw = " a\n✓\x1b".encode()
    own = level.encode(raw.decode()).ids
    for tokenizer, ids in ((level, own), (metaspace, [byte + 2 for byte in raw])):
        read = token_reader(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
        assert read(ids) == [" ", "a", "⏎\n", "‹E2›", "‹9C›", "✓", "␛"]
    assert read([1]) == [" a"]


def test_nothing_is_invisible_and_nothing_acts_on_the_screen():
    assert visible("a b") == "a b" and visible("\t\r\x00\x7f") == "⇥\t␍␀␡"
    assert visible("\u202e\u200b\u00a0\u2028") == "‹U+202E›‹U+200B›‹U+00A0›‹U+2028›"
    assert visible("é 漢 😀") == "é 漢 😀"


@pytest.mark.parametrize("name", ["dolly_sft_sample", "ultrafeedback_sample"])
def test_real_rows_are_shown_as_they_are_written(root, tmp_path, name):
    file = SHARED_DATA / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"{file.name} is not here")
    lines = file.read_text(encoding="utf-8").splitlines()[:20]
    lines = [line for line in lines if line.isascii()]  # what the tiny tokenizer has
    (tmp_path / "real.jsonl").write_text("\n".join(lines))
    stage = "sft" if "sft" in name else "dpo"
    more = [f"--data.path={tmp_path / 'real.jsonl'}", f"--data.cache-dir={tmp_path / 'cache'}"]
    more += ["--data.max-length=6000", "--batch.row-length=12000"]
    run = planned(
        configs.parse("alignjax.inspect", overrides(root, tmp_path / "run", stage, *more))
    )
    found = shown.contents(run, 2)
    rows = {f"line {i + 1}": json.loads(line) for i, line in enumerate(lines)}
    for sequence in (one for row in found.rows for one in row.sequences):
        row = rows[sequence.place.rpartition(", ")[2]]
        answer = row["messages"][-1]["content"] if stage == "sft" else row[sequence.side()]
        text = "".join(t.text for t in sequence.tokens if t.trained)
        assert text.replace("⏎", "").replace("⇥", "") == answer + END


def test_eight_devices_show_what_one_shows(root, tmp_path):
    one = contents_of(root, tmp_path, "dpo")
    mesh(fsdp=8)
    many = contents_of(root, tmp_path, "dpo")
    assert [row.sequences for row in one.rows] == [row.sequences for row in many.rows]
