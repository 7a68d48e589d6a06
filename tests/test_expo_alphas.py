"""Which alpha each tensor gets from the rules, and which rules are refused."""

import json

import pytest

from alignjax.extrapolation.alphas import Place, Rules, loaded, of_tensors, typed
from alignjax.models.families import TENSORS, tensor_names

LAYERS = 3
PLACES = {
    name: Place(leaf, layer if "{}" in TENSORS[leaf] else None)
    for leaf in TENSORS
    for layer, name in enumerate(tensor_names(leaf, LAYERS))
}
Q = "model.layers.{}.self_attn.q_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"


def found(alpha: float = 0.3, **rules) -> dict[str, float]:
    return of_tensors(loaded(Rules(**rules)), alpha, PLACES)


def refusal(**rules) -> str:
    with pytest.raises(ValueError) as error:
        found(**rules)
    return str(error.value)


def test_one_alpha_for_all_parameters():
    assert found() == dict.fromkeys(PLACES, 0.3)


@pytest.mark.parametrize(
    ("group", "part", "count"),
    [("attention", "self_attn", 21), ("mlp", "mlp.", 9), ("embeddings", "", 3), ("norms", "", 13)],
)
def test_a_group_has_its_own(group, part, count):
    changed = {name for name, alpha in found(**{group: "0.7"}).items() if alpha == 0.7}
    assert len(changed) == count and all(part in name for name in changed)
    assert set(found(**{group: "0.7"}).values()) == {0.3, 0.7}
    if group == "embeddings":
        assert changed == {"model.embed_tokens.weight", "lm_head.weight", "score.weight"}
    if group == "norms":
        assert all("norm" in name for name in changed)


def test_layers_take_a_list_or_an_expression():
    listed = found(layers="0,0.5,-1")
    assert [listed[UP.format(i)] for i in range(3)] == [0, 0.5, -1]
    assert listed["model.norm.weight"] == listed["lm_head.weight"] == 0.3
    rising = found(layers="alpha * layer / (layers - 1)")
    assert [rising[Q.format(i)] for i in range(3)] == [0, 0.15, 0.3]
    chosen = found(layers="alpha if layer >= 2 else max(0, -1) ** 2")
    assert [chosen[Q.format(i)] for i in range(3)] == [0, 0, 0.3]
    assert found(layers="0.2")[Q.format(1)] == 0.2


def test_each_rule_sees_what_those_before_it_gave():
    table = json.dumps({r"layers\.2\..*q_proj": "alpha + 1", "q_proj|up": 9})
    both = found(layers="layer", attention="alpha / 2", table=table)
    assert [both[Q.format(i)] for i in range(3)] == [9, 9, 2]
    assert [both[UP.format(i)] for i in range(3)] == [9, 9, 9]
    k = "model.layers.{}.self_attn.k_proj.weight"
    assert [both[k.format(i)] for i in range(3)] == [0, 0.5, 1]


def test_a_table_may_lie_in_a_file(tmp_path):
    file = tmp_path / "table.json"
    file.write_text('{"norm": "0"}')
    assert sum(alpha == 0 for alpha in found(table=str(file)).values()) == 13
    file.write_text("[0]")
    said = '--alpha.table: write an object, such as {"lm_head": 0}.'
    assert refusal(table=str(file)) == said


def test_rules_that_are_refused():
    name = "model.embed_tokens.weight"
    how = (
        "write numbers, alpha, layers, in a layer also layer, + - * / // % **, comparisons, `a if "
        "b else c`, min, max and abs."
    )
    assert refusal(embeddings="layer") == (
        f"--alpha.embeddings=layer: it gives no alpha for {name} (there is no layer); {how}"
    )
    assert refusal(embeddings="1/0") == (
        f"--alpha.embeddings=1/0: it gives no alpha for {name} (division by zero); {how}"
    )
    bad_ones = ("__import__('os')", "alpha.real", "'a'", "[1]", "1 +", "True", "(-1) ** 0.5")
    for bad in (*bad_ones, "10 ** 400"):
        assert refusal(embeddings=bad).startswith(f"--alpha.embeddings={bad}: it gives no alpha")
    assert refusal(layers="0.1,0.2") == (
        "--alpha.layers=0.1,0.2: these are 2 numbers, and the model has 3 layers; give one number "
        "for each."
    )
    assert refusal(table='{"gate_porj": 1}') == (
        "--alpha.table: 'gate_porj' matches no tensor; names are such as lm_head.weight."
    )
    assert refusal(table='{"(": 1}').startswith("--alpha.table: '(' is no regex (")
    assert refusal(table='{"a": ').startswith("--alpha.table: this is not JSON (")
    assert refusal(table="no-such.json") == (
        "--alpha.table=no-such.json: the file cannot be read (No such file or directory); write "
        "JSON, or name a file of it."
    )


def test_alphas_are_kept_as_they_were_typed():
    assert typed("0.10, -1,4") == {"0.10": 0.1, "-1": -1.0, "4": 4.0}
    for bad, one in (("0.1,x", "'x'"), ("", "''"), ("nan", "'nan'"), ("1,inf", "'inf'")):
        with pytest.raises(ValueError) as error:
            typed(bad)
        said = f"--alpha={bad}: {one} is no number; write such as 0.3 or 0.1,0.2."
        assert str(error.value) == said
    with pytest.raises(ValueError) as error:
        typed("0.1,0.10")
    assert str(error.value) == "--alpha=0.1,0.10: 0.10 is there twice; name each alpha once."
