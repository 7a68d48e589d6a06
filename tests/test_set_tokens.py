"""Sets of responses on disk: sequences, ranks, and what is left out of a set."""

import numpy as np
import pytest
from test_token_rows import SKIP
from tokencases import make, pair_row, sequences, tokenizer_text, write

from alignjax.data import tokens


def set_row(prompt: str, **scored: float) -> dict:
    return {"prompt": prompt, "responses": list(scored), "scores": list(scored.values())}


SETS = [
    set_row("why", no=1, because=4, so=4, perhaps=2),
    set_row("how", thus=1, so=2),
    set_row("when", now=3, then=2, soon=1),
]


@pytest.fixture
def made(tmp_path, tokenizer, tokenizer_dir):
    """`made(rows, **settings)` tokenizes rows for a reward model."""

    def run(rows: list[dict], stage: str = "rm", **settings) -> tokens.TokenSet:
        path = write(tmp_path / "d.jsonl", rows)
        return make(path, tokenizer, tokenizer_dir, tmp_path, stage, **settings)

    return run


def answers(data: tokens.TokenSet, tokenizer) -> list[str]:
    texts = (tokenizer_text(data, tokenizer, i) for i in range(len(data.ranks)))
    return [text.split("assistant\n")[1].removesuffix("<|im_end|>\n") for text in texts]


def test_sequences_go_from_the_best_to_the_worst(made, tokenizer):
    data = made(SETS)
    assert (len(data), data.sides, data.counts) == (3, 4, {"read": 3, "kept": 3})
    assert answers(data, tokenizer) == [
        *("because", "so", "perhaps", "no"),
        *("so", "thus"),
        *("now", "then", "soon"),
    ]
    assert data.ranks.tolist() == [1, 1, 2, 3, 1, 2, 1, 2, 3]
    assert data.starts.tolist() == [0, 4, 6, 9]
    lengths = np.diff(data.offsets)
    assert data.lengths().tolist() == [lengths[:4].sum(), lengths[4:6].sum(), lengths[6:].sum()]
    assert data.by_item(lengths)[1].tolist() == [*lengths[4:6], 0, 0]
    trained = [sum(mask) for _, mask in sequences(data)]
    assert data.trained_counts()[2].tolist() == [*trained[6:], 0]


def test_the_pairs_are_all_in_which_one_is_better(made):
    found = np.concatenate([np.stack(part, 1) for part in made(SETS).pairs()])
    assert found.tolist() == [
        *([0, 0, 2], [0, 0, 3], [0, 1, 2], [0, 1, 3], [0, 2, 3]),
        [1, 0, 1],
        *([2, 0, 1], [2, 0, 2], [2, 1, 2]),
    ]


def test_a_file_of_sets_of_two_is_one_of_pairs(made):
    sets = made([set_row("why", no=1, because=2), set_row("how", so=3, thus=1)])
    pairs = made([pair_row("why", "because", "no"), pair_row("how", "so", "thus")])
    assert sets.sides == pairs.sides == 2 and sets.key == pairs.key
    for name in ("tokens", "trained", "offsets", "ranks", "starts"):
        np.testing.assert_array_equal(getattr(sets, name), getattr(pairs, name))


def test_pairs_and_sets_may_be_of_one_file(made):
    data = made([*SETS[:1], pair_row("x", "y", "z")])
    assert (data.sides, data.ranks.tolist()) == (4, [1, 1, 2, 3, 1, 2])


def test_responses_that_are_too_long_are_left_out(made, tokenizer):
    long = "no " * 60
    rows = [
        set_row("why", **{long: 9, "so": 2, "thus": 1}),
        set_row("how", **{long: 9, "so": 2, "thus": 2}),
        set_row("when", **{long: 9, "so": 2}),
        pair_row("where", "here", long),
    ]
    data = made(rows, max_length=100)
    assert answers(data, tokenizer) == ["so", "thus"]
    assert data.ranks.tolist() == [2, 3]  # of the row
    assert data.counts == {
        "read": 4,
        "longer than 100 tokens, dropped": 3,
        "responses longer than 100 tokens, left out": 1,
        "kept": 1,
    }


@pytest.mark.parametrize(("most", "kept"), [(2, "ae"), (3, "ace"), (4, "abde"), (5, "abcde")])
def test_a_set_is_thinned_evenly_between_its_best_and_its_worst(made, tokenizer, most, kept):
    rows = [set_row("why", c=3, a=5, e=1, b=4, d=2)]
    data = made(rows, max_responses=most)
    assert answers(data, tokenizer) == list(kept)
    thinner = {} if most == 5 else {f"cut to {most} responses": 1}
    assert data.counts == {"read": 1} | thinner | {"kept": 1}


def test_every_side_loses_the_same_of_a_long_prompt(made):
    rows = [set_row("w" * 200, a=1, b=2, c=3)]
    assert not len(made(rows, max_length=80))
    data = made(rows, max_length=80, max_prompt_length=50)
    lengths = np.diff(data.offsets)
    assert (lengths < 80).all() and len(set(lengths)) == 1
    assert data.counts["prompt cut to 50 tokens"] == 1


def test_equal_tokens_of_unequal_scores_are_a_bad_row(made, tokenizer, tmp_path):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content']", "m['content'].strip()"
    )
    rows = [
        set_row("x", **{"same": 1, "other": 2, "same ": 1}),
        set_row("x", same=1, **{"same ": 2}),
    ]
    with pytest.raises(ValueError) as caught:
        made(rows)
    assert str(caught.value) == (
        f"{tmp_path / 'd.jsonl'}, line 2: two of its responses have the same tokens, and one is "
        f"scored higher; remove one of them, or the row{SKIP}"
    )


def test_a_cache_of_rm_is_not_that_of_dpo(made, tmp_path):
    for stage in ("rm", "dpo"):
        made([pair_row("why", "because", "no")], stage)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
