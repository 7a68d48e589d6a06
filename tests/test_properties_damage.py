"""The oracle of the random rows sees damage to batches, spans, masks and pieces.

Damaged files of rows give rows or one sentence.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from oracle import SPECIAL, check_steps, run, write_byte_tokenizer

from alignjax.data import chat, fitting
from alignjax.data.batches import PackedSteps

pytestmark = pytest.mark.slow  # minutes

PLAIN_SAMPLE = {
    "seed": 3,
    "pool": ["The sky ", "is blue", "🐝\n", "<|im_end|>"],
    "strings": "chat",
    "train_on": "all",
    "overlong": "split",
    "max_length": 120,
    "room": 100,
    "mode": "items",
    "per_step": 8,
    "epochs": 2,
    "rows": 2,
    "files": 2,
}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def sample(tmp_path, tokenizer_dir, stage="sft", **changes):
    drawn = PLAIN_SAMPLE | changes
    steps, items = run(stage, drawn, tmp_path, chat.load_tokenizer(tokenizer_dir), tokenizer_dir)
    check_steps(steps, items, drawn["epochs"])
    return steps, items


def swapped(segments: np.ndarray) -> np.ndarray:
    """Every first sequence sees the second."""
    return np.where(segments == 2, 1, segments)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("tokens", lambda a: np.where(a == len(SPECIAL) + ord("s"), 5, a)),
        ("positions", lambda a: np.where(a == 7, 8, a)),
        ("positions", lambda a: np.maximum.accumulate(a, -1)),
        ("segments", swapped),
        ("segments", lambda a: np.minimum(a, 1)),
        ("targets", lambda a: np.where(a > 0, a - 1, 0)),
        ("targets", lambda a: np.where(a > 0, a + 1, 0)),
        ("targets", lambda a: np.where(np.arange(a.shape[-1]) == 0, 0, a)),
        ("items", lambda a: np.roll(a, 1, -1)),
        ("items", lambda a: np.where(a == 1, 2, a)),
    ],
)
def test_damage_to_a_batch_is_seen(tmp_path, tokenizer_dir, monkeypatch, stage, field, change):
    steps, items = sample(tmp_path, tokenizer_dir, stage)
    real = PackedSteps.__getitem__

    def damaged(self, step):
        batch = real(self, step)
        return batch._replace(**{field: change(getattr(batch, field))})

    monkeypatch.setattr(PackedSteps, "__getitem__", damaged)
    with pytest.raises(AssertionError):
        check_steps(steps, items, PLAIN_SAMPLE["epochs"])


def wider(spans, text):
    return [(start - 1, end) for start, end in spans]


def narrower(spans, text):
    return [(start, end - 1) for start, end in spans]


def first_only(spans, text):
    return spans[:1]


def to_the_end(spans, text):
    return [(spans[0][0], len(text))]


@pytest.mark.parametrize("change", [wider, narrower, first_only, to_the_end])
def test_damage_to_spans_is_seen(tmp_path, tokenizer_dir, monkeypatch, change):
    real = chat._spans

    def damaged(*arguments):
        text, spans, around = real(*arguments)
        return text, change(spans, text), around

    monkeypatch.setattr(chat, "_spans", damaged)
    with pytest.raises(AssertionError):
        sample(tmp_path, tokenizer_dir)


def test_a_shifted_mask_is_seen(tmp_path, tokenizer_dir, monkeypatch):
    real = chat._mask_spans

    def damaged(encoding, spans):
        ids, mask = real(encoding, spans)
        return ids, np.roll(mask, 1)

    monkeypatch.setattr(chat, "_mask_spans", damaged)
    with pytest.raises(AssertionError):
        sample(tmp_path, tokenizer_dir)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_mask_of_plain_text_is_seen(tmp_path, tokenizer_dir, monkeypatch, shift):
    real = chat._mask_plain
    monkeypatch.setattr(
        chat, "_mask_plain", lambda encoding, prompt, eos: real(encoding, prompt + shift, eos)
    )
    with pytest.raises(AssertionError):
        sample(tmp_path, tokenizer_dir, strings="plain")


@pytest.mark.parametrize("stride", [-1, 1])
def test_pieces_at_other_places_are_seen(tmp_path, tokenizer_dir, monkeypatch, stride):
    real = fitting._pieces

    def damaged(ids, mask, max_length):
        for start in range(0, len(ids) - 1, max_length - 1 + stride):
            yield from list(real(ids[start:], mask[start:], max_length))[:1]

    monkeypatch.setattr(fitting, "_pieces", damaged)
    with pytest.raises(AssertionError):
        sample(tmp_path, tokenizer_dir)


@pytest.mark.parametrize(
    "kind",
    ["types", "jsonl", "json", "jsonl.gz", "parquet", "arrow", "arrow.gz", "feather", "saved"],
)
def test_a_damaged_file_gives_rows_or_a_sentence(tmp_path, kind):
    """In a process of its own, as a fault of the library that reads it may be a crash."""
    script = Path(__file__).with_name("damage.py")
    command = [sys.executable, str(script), kind, "80", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, (ended.stdout[-60:], ended.stderr[-2000:])
    refused = re.search(r"(\d+) of 80 refused$", ended.stdout)
    assert refused and 0 <= int(refused[1]) < 80
