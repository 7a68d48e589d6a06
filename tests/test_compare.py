"""Two forms of a model compared: by hand on logits, and by `--check` as a user runs it."""

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import tiny_config, write_model
from safetensors.numpy import load_file, save_file

from alignjax import convert as command
from alignjax.weights import compare
from alignjax.weights.orbax import open_orbax
from alignjax.weights.orbax_write import write_model as write_orbax
from alignjax.weights.safetensors import open_directory

quiet = pytest.mark.filterwarnings("default")  # transformers warns


def test_agreement_by_hand():
    p = np.log([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]])
    q = np.log([[[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]]) + 3  # a constant changes no distribution
    found = compare.agreement(p, q)
    assert (found.tokens, found.same) == (2, 0.5)
    assert found.difference == pytest.approx(3 + np.log(2))
    assert found.spread == pytest.approx(np.log(2) * np.sqrt(2) / 3)
    assert found.kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)


def test_two_models_of_orbax_are_compared_without_torch(tmp_path):
    write_model(tmp_path / "hf", tiny_config(False, vocab_size=100))
    source = open_directory(tmp_path / "hf")
    for name, dtype in (("one", "source"), ("two", "source"), ("bf16", "bfloat16")):
        write_orbax(source, tmp_path / name, dtype)
    one, two, bf16 = (open_orbax(tmp_path / name) for name in ("one", "two", "bf16"))
    same = compare.compare(one, two)
    assert (same.difference, same.kl, same.same, same.tokens) == (0, 0, 1, 128)
    rounded = compare.compare(one, bf16)
    assert 1e-4 < rounded.difference < 0.1 and 0 < rounded.kl < 1e-3


def test_check_is_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError) as error:
        command.convert(command.parse(["--src=a", f"--dst={tmp_path / 'b'}", "--check"]))
    assert str(error.value) == "--check: one process compares; start one alone, or leave it out."


def test_check_needs_torch(monkeypatch):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    args = command.parse(["--src=none", "--dst=none", "--check"])
    with pytest.raises(ValueError) as error:
        command.convert(args)
    assert str(error.value) == (
        "--check: transformers computes models with torch, which is not installed; install "
        "alignjax with the extra `parity`, or leave --check out."
    )


def checked(capsys, *arguments: str) -> str:
    pytest.importorskip("torch", reason="the extra `parity` is not installed")
    capsys.readouterr()
    command.convert(command.parse([*arguments, "--check"]))
    return capsys.readouterr().out.splitlines()[-1]


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_check_says_how_far_transformers_agrees(tmp_path, capsys, tied):
    write_model(tmp_path / "hf", tiny_config(tied, vocab_size=100))
    for src, dst, to in (("hf", "orbax", "orbax"), ("orbax", "back", "hf")):
        line = [f"--src={tmp_path / src}", f"--dst={tmp_path / dst}", f"--to={to}"]
        said = checked(capsys, *line)
        assert said.startswith("checked: on 128 random tokens logits differ by at most ")
        assert said.endswith("and 100.0% of the most likely next tokens are the same")
    line = [f"--src={tmp_path}/hf", f"--dst={tmp_path}/bf16", "--dtype=bfloat16"]
    assert checked(capsys, *line).startswith("checked: ")


@quiet
@pytest.mark.slow
def test_check_refuses_what_computes_something_else(tmp_path, capsys, monkeypatch):
    write_model(tmp_path / "hf", tiny_config())
    original = compare._ours

    def damaged(source, tokens_BT):
        file = source.path / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.1.self_attn.q_proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name][::-1])
        save_file(tensors, file, metadata={"format": "pt"})
        return original(source, tokens_BT)

    monkeypatch.setattr(compare, "_ours", damaged)
    with pytest.raises(ValueError) as error:
        checked(capsys, f"--src={tmp_path}/hf", f"--dst={tmp_path}/out")
    start = f"--check: {tmp_path}/out does not compute what {tmp_path}/hf does: on 128 random "
    assert str(error.value).startswith(start) and str(error.value).endswith("are the same.")


def test_a_narrow_dtype_is_that_of_both(tmp_path):
    """bfloat16 weights are the same numbers in float32."""
    write_model(tmp_path / "hf", tiny_config(), dtype=np.dtype(ml_dtypes.bfloat16))
    source = open_directory(tmp_path / "hf")
    write_orbax(source, tmp_path / "wide", "float32")
    write_orbax(source, tmp_path / "same", "source")
    found = compare.compare(open_orbax(tmp_path / "same"), open_orbax(tmp_path / "wide"))
    assert (found.difference, found.kl) == (0, 0)
