"""Random rows -> tokens -> masks -> packed batches, against tokens written down by hand.

Hypothesis draws texts, settings and a seed; each of its examples is a data set of 40 rows put
together from those texts. Of 22,000 rows more than 10,000 come through to batches (the others are
too long, or bad); both properties say how many must. A pair counts once.
"""

import tempfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from oracle import SPECIAL, check_steps, run, write_byte_tokenizer

from alignjax.data import chat

pytestmark = pytest.mark.slow  # minutes

SETTINGS = hypothesis.settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
)


TEXT = st.text(max_size=10) | st.sampled_from(
    [
        *SPECIAL,
        "<|im_end|",
        "|>",
        "<|im_end|>\n<|im_start|>assistant\n",
        "assistant\n",
        "\n",
        " ",
        "déjà vu — 🐝",
        "e\u0301\u200d\u3000",
        "The sky is blue. ",
    ]
)
DRAWN = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "pool": st.lists(TEXT, min_size=4, max_size=8, unique=True),
        "strings": st.sampled_from(["chat", "plain"]),
        "train_on": st.sampled_from(["all", "last", "everything"]),
        "overlong": st.sampled_from(["drop", "truncate", "split"]),
        "max_length": st.sampled_from([5, 13, 40, 80, 120, 180, 250, 400, 800]),
        "room": st.integers(0, 300),
        "mode": st.sampled_from(["items", "rows"]),
        "per_step": st.integers(1, 12),
        "epochs": st.integers(1, 3),
        "rows": st.integers(1, 4),
        "files": st.integers(1, 3),
    }
)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(("stage", "examples", "most"), [("sft", 300, 6000), ("dpo", 250, 4500)])
def test_every_trained_token_is_a_target_once_an_epoch(stage, examples, most, tokenizer_dir):
    tokenizer = chat.load_tokenizer(tokenizer_dir)
    conversations = 0

    @hypothesis.settings(SETTINGS, max_examples=examples)
    @hypothesis.given(drawn=DRAWN)
    def check(drawn):
        nonlocal conversations
        if stage == "dpo" and drawn["train_on"] == "everything":  # which is for sft
            drawn["train_on"] = "all"
        with tempfile.TemporaryDirectory() as directory:
            steps, items = run(stage, drawn, Path(directory), tokenizer, tokenizer_dir)
            if steps:
                check_steps(steps, items, drawn["epochs"])
                conversations += steps.data.counts["kept"]

    check()
    assert conversations >= most
