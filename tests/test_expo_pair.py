"""Two checkpoints that do, or do not, fit together, and what is said of how far they lie apart."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import tiny_config, write_model
from expomodels import EMBED, HEAD, Q, change, run, tensors_of
from expomodels import write_pair as write

from alignjax.extrapolation import delta
from alignjax.extrapolation.pair import differences, pair_of
from alignjax.weights.safetensors import open_directory

UNTIED = tiny_config(tied=False)


def opened(root, **arguments):
    sides = (open_directory(root / name) for name in ("strong", "weak"))
    return pair_of(*sides, arguments.pop("common_rows", False), np.zeros(0, np.int64))


def refusal(root) -> str:
    with pytest.raises(ValueError) as error:
        opened(root)
    return str(error.value)


def sides(root, weak, strong) -> None:
    write_model(root / "weak", weak, seed=1)
    write_model(root / "strong", strong, seed=2)


@pytest.mark.parametrize("name", ["layers", "mlp_size", "kv_heads"])
def test_another_shape_is_refused(tmp_path, name):
    other = {"layers": 4, "mlp_size": 96, "kv_heads": 4}[name]
    sides(tmp_path, dataclasses.replace(UNTIED, **{name: other}), UNTIED)
    assert refusal(tmp_path) == (
        f"--weak={tmp_path}/weak: its {name} is {other}, and that of {tmp_path}/strong is "
        f"{getattr(UNTIED, name)}, so they are not two checkpoints of one model."
    )


@pytest.mark.parametrize(("weak", "strong"), [(131, 137), (137, 131)])
def test_vocabularies_of_two_sizes_share_the_rows_that_both_have(tmp_path, weak, strong):
    sides(tmp_path, *(dataclasses.replace(UNTIED, vocab_size=size) for size in (weak, strong)))
    assert refusal(tmp_path) == (
        f"--weak={tmp_path}/weak: its vocab_size is {weak}, and that of {tmp_path}/strong is "
        f"{strong}, so they are not two checkpoints of one model; --common-rows takes the rows "
        "that both have."
    )
    found = run(tmp_path, "--common-rows", alpha="0.3,-1")
    theta, theta_sft = tensors_of(tmp_path / "strong"), tensors_of(tmp_path / "weak")
    moved, back = (tensors_of(found / f"alpha_{alpha}") for alpha in ("0.3", "-1"))
    for name in (EMBED, HEAD):
        assert moved[name].shape == theta[name].shape
        one, other = theta[name][:131], theta_sft[name][:131]
        assert np.array_equal(moved[name][:131], one + np.float32(0.3) * (one - other))
        assert np.array_equal(moved[name][131:], theta[name][131:])
        assert np.array_equal(back[name], np.concatenate([other, theta[name][131:]]))
    assert json.loads((found / "alpha_-1/config.json").read_text())["vocab_size"] == strong


def test_a_tied_head_on_one_side(tmp_path):
    sides(tmp_path, UNTIED, tiny_config(tied=True))
    assert refusal(tmp_path) == (
        f"--weak={tmp_path}/weak: its head is a tensor of its own, and {tmp_path}/strong ties the "
        "head to the embedding; untie it there (tie_word_embeddings and lm_head.weight)."
    )
    (tmp_path / "weak").rename(tmp_path / "x")
    (tmp_path / "strong").rename(tmp_path / "weak")
    (tmp_path / "x").rename(tmp_path / "strong")
    found = tensors_of(run(tmp_path))
    head, embed = tensors_of(tmp_path / "strong")[HEAD], tensors_of(tmp_path / "weak")[EMBED]
    assert np.array_equal(found[HEAD], head + np.float32(0.3) * (head - embed))


def test_what_differs_beside_the_weights_is_told(tmp_path):
    sides(tmp_path, UNTIED, UNTIED)
    assert differences(opened(tmp_path)) == []
    file = tmp_path / "strong/config.json"
    file.write_text(file.read_text().replace("500000.0", "10000.0"))
    tokenizer = json.loads((tmp_path / "weak/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (tmp_path / "weak/tokenizer.json").write_text(json.dumps(tokenizer))
    first = min(vocabulary["A"], vocabulary["B"])
    assert differences(opened(tmp_path)) == [
        "rope_theta is 10000.0 in the strong checkpoint and 500000.0 in the weak one; the result "
        "has the strong one's.",
        f"2 tokens have another text, such as {first}: 'A' and 'B'; their rows of the embedding do "
        "not belong together.",
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_report_counts_and_sums_each_tensor(tmp_path, dtype):
    write(tmp_path, dtype=dtype)
    pair = opened(tmp_path)
    for whole in (True, False):
        found = delta.measure(pair, "bfloat16", whole)
        strong, weak = tensors_of(tmp_path / "strong"), tensors_of(tmp_path / "weak")
        assert set(found) == set(strong)
        for name, one in found.items():
            theta = strong[name].astype(np.float64).reshape(-1)
            apart = theta - weak[name].astype(np.float64).reshape(-1)
            ulp = 2.0 ** (np.floor(np.log2(np.abs(theta))) - 7)
            expected = [len(theta), theta @ theta, theta @ apart, apart @ apart]
            expected += [np.sum(apart == 0), np.sum(np.abs(apart) < ulp)]
            # A delta of norms may be a multiple of the last bit of float32.
            assert one.sums == pytest.approx(expected, rel=1e-3, abs=1e-4)
            product = weak[name].astype(np.float64).reshape(-1) @ theta
            norms = np.linalg.norm(theta), np.linalg.norm(theta - apart)
            assert one.likeness == pytest.approx(product / np.prod(norms), rel=1e-4)
            assert one.relative == pytest.approx(np.linalg.norm(apart) / norms[0], rel=1e-2)


def test_a_sample_is_spread_over_a_tensor_and_stands_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(delta, "SAMPLE", 256)
    starts = [index[0].start for index in delta.spots((1000, 32))]
    assert starts[0] == 0 and starts[-1] == 999 and len(starts) == 8
    assert delta.spots((8, 32)) == [(slice(0, 8), slice(None))]
    assert delta.spots((32,)) == [(slice(0, 32),)]
    write(tmp_path)
    pair = opened(tmp_path)
    sample, whole = (delta.by_group(pair, delta.measure(pair, "source", w)) for w in (False, True))
    for name, one in whole.items():
        assert sample[name].elements == pytest.approx(one.elements)
        assert sample[name].relative == pytest.approx(one.relative, rel=0.1)
    assert sample["mlp"].sums != whole["mlp"].sums


def warned(root, capsys, *arguments: str) -> list[str]:
    capsys.readouterr()
    run(root, "--dry-run", *arguments)
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("warning: ")]


def test_one_finetuned_from_the_other_is_not_warned_about(tmp_path, capsys):
    write(tmp_path)
    assert warned(tmp_path, capsys) == []


def test_unrelated_checkpoints_are_warned_about_with_numbers(tmp_path, capsys):
    sides(tmp_path, UNTIED, UNTIED)
    (line,) = warned(tmp_path, capsys)
    start, end = line.split(" of their norm, and the cosine of the two is ")
    said, share = start.rsplit(" ", 1)
    assert said == (
        "warning: these do not look like one finetuned from the other: the layers' matrices differ "
        "by"
    )
    assert float(share[:-1]) == pytest.approx(141, abs=3)
    assert abs(float(end.split(". ")[0])) < 0.02


def test_checkpoints_far_apart_are_warned_about_with_numbers(tmp_path, capsys):
    write(tmp_path, size=0.01)  # of weights of 0.1
    (line,) = warned(tmp_path, capsys)
    assert line == (
        "warning: they lie far apart for preference training: the layers' matrices differ by "
        f"{float(line.split('differ by ')[1].split('%')[0])}% of their norm, and the cosine of the "
        f"two is 0.9950; DPO mostly leaves less than 3%. A base model and its SFT often do, of "
        "which it gained nothing."
    )
    assert "differ by 9.9%" in line or "differ by 10.0%" in line


def test_equal_and_rounded_checkpoints_are_warned_about(tmp_path, capsys):
    write(tmp_path, size=0)
    assert warned(tmp_path, capsys) == [
        "warning: the two checkpoints are the same where they were compared; any alpha gives that."
    ]
    write(tmp_path, dtype="bfloat16", size=1e-4)
    (line,) = warned(tmp_path, capsys)
    assert line.endswith(
        "% of the elements are the same on both sides, since 16 bits round small differences away; "
        "a run directory has float32 weights."
    )
    write(tmp_path, dtype="float32", size=1e-5)
    assert warned(tmp_path, capsys) == []
    (line,) = warned(tmp_path, capsys, "--dtype=bfloat16")
    assert line.endswith(
        "% of the elements differ by less than the output's dtype tells apart; --dtype=float32 "
        "keeps what is added to them."
    )


def test_weights_that_are_not_finite_are_told(tmp_path, capsys):
    write(tmp_path)
    change(tmp_path / "weak", lambda name, one: one * (np.nan if name == Q else 1))
    assert warned(tmp_path, capsys) == [
        "warning: some weights are not finite (NaN or infinity), or their squares are not."
    ]
