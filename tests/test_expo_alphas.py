"""Which alpha each tensor gets from the rules, and which rules are refused."""

import json

import pytest

from alignjax.errors import UserError
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
    with pytest.raises(UserError) as error:
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


def test_layers_take_a_number_or_one_each():
    listed = found(layers="0,0.5,-1")
    assert [listed[UP.format(i)] for i in range(3)] == [0, 0.5, -1]
    assert listed["model.norm.weight"] == listed["lm_head.weight"] == 0.3
    assert found(layers="0.2")[Q.format(1)] == 0.2


def test_the_last_rule_that_names_a_tensor_counts():
    table = json.dumps({"layers.2.*q_proj": 1, "q_proj": 9, "layers.?.mlp.[ud]": 8})
    both = found(layers="0,1,2", attention="0.5", table=table)
    assert [both[Q.format(i)] for i in range(3)] == [9, 9, 1]
    assert [both[UP.format(i)] for i in range(3)] == [8, 8, 8]
    k, gate = "model.layers.{}.self_attn.k_proj.weight", "model.layers.{}.mlp.gate_proj.weight"
    assert [both[k.format(i)] for i in range(3)] == [0.5, 0.5, 0.5]
    assert [both[gate.format(i)] for i in range(3)] == [0, 1, 2]


def test_a_table_may_lie_in_a_file(tmp_path):
    file = tmp_path / "table.json"
    file.write_text('{"norm": 0}')
    assert sum(alpha == 0 for alpha in found(table=str(file)).values()) == 13
    nested = '{"mlp":' * 100_000
    for bad in ("[0]", '{"norm": "0"}', "{", nested, '{"norm": 1e999}', " " * (1 << 20) + "{}"):
        file.write_text(bad)
        assert str(file) in refusal(table=str(file))


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"embeddings": "nan"}, "--alpha.embeddings=nan: it must be a finite number"),
        ({"mlp": "9**9**9"}, "--alpha.mlp=9**9**9: write numbers"),
        ({"mlp": "1" + "+1" * 20_000}, "--alpha.mlp=1+1+1"),
        ({"norms": "1,2"}, "--alpha.norms: these are 2 numbers; give one"),
        ({"layers": "nan"}, "--alpha.layers=nan: it must be a finite number"),
        ({"layers": "0.1,inf,0"}, "--alpha.layers=inf: it must be a finite number"),
        ({"layers": "1e39"}, "--alpha.layers=1e+39: it must be at least -1000 and at most 1000"),
        ({"layers": "alpha / 2"}, "--alpha.layers=alpha / 2: write numbers"),
        ({"layers": "0.1,0.2"}, "--alpha.layers: these are 2 numbers; give one, or 3 of them"),
        ({"table": '{"gate_porj": 1}'}, "--alpha.table: 'gate_porj' matches no tensor"),
        ({"table": '{"a": '}, "--alpha.table: this is not JSON ("),
        ({"table": '{"mlp":' * 100_000}, "--alpha.table: this is not JSON ("),
        ({"table": '{"mlp": 1e39}'}, "--alpha.table: mlp=1e+39: it must be at least -1000"),
        ({"table": '{"mlp": {"mlp": 1}}'}, "--alpha.table: mlp={'mlp': 1}: it must be a finite"),
        ({"table": "no-such.json"}, "no-such.json: there is no such file"),
        ({"table": json.dumps({"([a-z0-9._]+)+Z$|mlp": 1})}, "--alpha.table: '([a-z0-9._]+)+Z$"),
        ({"table": json.dumps({"*a" * 5000: 1})}, "--alpha.table: '*a*a"),
    ],
)
def test_rules_that_are_refused(rules, said):
    assert refusal(**rules).startswith(said)


def test_alphas_are_kept_as_they_were_typed():
    assert typed("0.10, -1,4") == {"0.10": 0.1, "-1": -1.0, "4": 4.0}
    for bad in ("0.1,x", "", "nan", "1,inf", "1e39", "-1001", "9**9**9"):
        with pytest.raises(UserError, match=r"^--alpha="):
            typed(bad)
    with pytest.raises(UserError, match=r"^--alpha=0.1,0.10: 0.10 is there twice; name"):
        typed("0.1,0.10")
