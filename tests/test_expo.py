"""The command `alignjax.expo`: every form of checkpoint in and out, and what stays to the bit."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import BF16, mesh, tiny_config, write_model
from expomodels import (
    EMBED,
    HEAD,
    NORM,
    UP,
    Q,
    bytes_in,
    change,
    expected,
    run,
    save_run,
    tensors_of,
)
from expomodels import write_pair as write
from presets import tiny
from safetensors.numpy import save_file

from alignjax import convert
from alignjax import expo as command
from alignjax.errors import UserError
from alignjax.extrapolation import arithmetic
from alignjax.extrapolation.alphas import Rules
from alignjax.weights import stream

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_alphas_in_one_pass_have_a_directory_each(tmp_path, dtype):
    write(tmp_path, dtype=dtype)
    out = run(tmp_path, alpha="0.1,0.3,-0.5")
    assert sorted(path.name for path in out.iterdir()) == ["alpha_-0.5", "alpha_0.1", "alpha_0.3"]
    for alpha in (0.1, 0.3, -0.5):
        found = out / f"alpha_{alpha}"
        assert bytes_in(found) == expected(tmp_path, alpha, dtype)
        names = {path.name for path in (tmp_path / "strong").iterdir() if ".saf" not in path.name}
        assert {path.name for path in found.iterdir()} == names | {"README.md", "model.safetensors"}
        for name in names:
            if name != "config.json":
                assert (found / name).read_bytes() == (tmp_path / "strong" / name).read_bytes()
        assert f"# theta + {alpha} (theta - theta_sft)" in (found / "README.md").read_text()
    one, other = (path / "config.json" for path in (tmp_path / "strong", found))
    assert json.loads(one.read_text()) == json.loads(other.read_text())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("hidden", "to"), [(64, "hf"), (48, "hf"), (48, "orbax")])
def test_tensors_large_enough_to_be_compiled_for(tmp_path, monkeypatch, dtype, hidden, to):
    """The embedding, in parts of which the last is filled up; NumPy does the other tensors."""
    sizes = []
    compiled = arithmetic._compiled

    def counted(strong, *others):
        sizes.append(strong.size)
        return compiled(strong, *others)

    monkeypatch.setattr(arithmetic, "_compiled", counted)
    c = tiny_config(vocab_size=30_000, hidden_size=hidden)
    write(tmp_path, c, dtype=dtype)
    out = run(tmp_path, f"--to={to}", alpha="0.3,-0.5")
    rows = stream.MOST // (hidden * np.dtype(dtype).itemsize)
    assert 30_000 % rows * hidden > arithmetic.PIECE
    assert sizes == [rows * hidden] * -(-30_000 // rows)
    for alpha in (0.3, -0.5):
        found = out / f"alpha_{alpha}"
        if to == "orbax":
            found, stored = tmp_path / f"hf_{alpha}", found
            convert.convert(convert.parse([f"--src={stored}", f"--dst={found}"]))
        assert bytes_in(found) == expected(tmp_path, alpha, dtype)


def test_the_command_as_a_user_runs_it(tmp_path):
    write(tmp_path)
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "XLA_FLAGS": ""}
    line = [sys.executable, "-m", "alignjax.expo", "--weak", "weak", "--strong", "strong"]
    line += ["--alpha", "0.3", "--alpha.norms", "0", "--out", "out", "--shard-bytes", "40000"]
    done = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "extrapolating strong from weak"
    pattern = r"wrote out, 1 Hugging Face directory, 0\.1 MB in \d+\.\d s \(\d\.\d{3} GB/s\)"
    assert re.fullmatch(pattern, lines[-1])
    shown = done.stdout.index("theta - theta_sft, from up to 131,072 elements a tensor")
    assert shown < done.stdout.index("by layer: norm of each module's delta, of theta's;")
    assert done.stdout.index("by layer") < done.stdout.index("extrapolating (GB)")
    moved, strong = expected(tmp_path, 0.3), bytes_in(tmp_path / "strong")
    wanted = {name: strong[name] if "norm" in name else moved[name] for name in moved}
    assert bytes_in(tmp_path / "out") == wanted
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    done = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: --out=out: it is there already; delete it, or name another one.\n",
    )


def odd(root: Path) -> None:
    """Makes theta much larger than theta_sft; puts in what arithmetic would change."""
    change(root / "strong", lambda _, one: 1e6 * one)
    for number, side in enumerate(("weak", "strong")):

        def put(_, one, number=number):
            flat = one.copy().reshape(-1)
            flat[0] = -0.0
            bits = flat.view(f"u{one.dtype.itemsize}")
            payloads = {2: (0x7F81, 0xFFC3), 4: (0x7F800001, 0xFFC12345)}[one.dtype.itemsize]
            bits[1:3] = np.array(payloads) + number
            flat[3] = np.inf
            return flat.reshape(one.shape)

        change(root / side, put)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_alphas_of_0_and_minus_1_are_the_sources_own_bytes(tmp_path, dtype, to):
    write(tmp_path, dtype=dtype)
    odd(tmp_path)
    strong, weak = bytes_in(tmp_path / "strong"), bytes_in(tmp_path / "weak")
    out = run(tmp_path, f"--to={to}", "--alpha.mlp=-1", alpha="-0.0,-1,1")
    for text, other in (("-0.0", strong), ("-1", weak)):
        found = out / f"alpha_{text}"
        if to == "orbax":
            arguments = [f"--src={found}", f"--dst={tmp_path / text}"]
            assert convert.convert(convert.parse(arguments)) == 0
            found = tmp_path / text
        mlp = {name for name in strong if ".mlp." in name}
        assert len(mlp) == 9
        assert bytes_in(found) == {n: (weak if n in mlp else other)[n] for n in strong}


def test_alphas_differ_by_module_layer_and_name(tmp_path):
    write(tmp_path)
    out = run(
        tmp_path,
        "--alpha.attention=2",
        "--alpha.layers=0,1,0.5",
        '--alpha.table={"embed_tokens": -1, "layers.2.*norm": 4}',
    )
    found, strong, weak = bytes_in(out), bytes_in(tmp_path / "strong"), bytes_in(tmp_path / "weak")
    assert found[EMBED] == weak[EMBED]
    assert found[HEAD] == expected(tmp_path, 0.3)[HEAD]
    assert found[NORM] == strong[NORM]
    assert found[Q] == expected(tmp_path, 2.0)[Q]
    assert found[UP] == expected(tmp_path, 0.5)[UP]


def test_rows_of_special_tokens_can_be_left_alone(tmp_path):
    write(tmp_path, dtype="bfloat16")
    found = tensors_of(run(tmp_path, "--special-tokens=keep"))
    strong, moved = tensors_of(tmp_path / "strong"), expected(tmp_path, 0.3, "bfloat16")
    for name in (EMBED, HEAD):
        assert found[name][:3].tobytes() == strong[name][:3].tobytes()
        rest = np.frombuffer(moved[name][2], BF16).reshape(moved[name][1])[3:]
        assert found[name][3:].tobytes() == rest.tobytes()
    assert found[Q].tobytes() == moved[Q][2]


def test_special_rows_of_an_interpolation_and_of_the_weak_side(tmp_path):
    """Also where the strong side has more rows than the weak one."""
    write(tmp_path, tiny_config(tied=False), dtype="bfloat16")
    more = tiny_config(tied=False, vocab_size=tiny_config().vocab_size + 16)
    write_model(tmp_path / "more", more, dtype=BF16)
    sides = [f"--strong={tmp_path / 'more'}", f"--weak={tmp_path / 'weak'}"]
    out = run(tmp_path, *sides, "--special-tokens=keep", "--common-rows", alpha="-1,-0.5")
    strong, weak = (tensors_of(tmp_path / name) for name in ("more", "weak"))
    for name in (EMBED, HEAD):
        common = len(weak[name])
        theta, theta_sft = strong[name].astype(np.float32), weak[name].astype(np.float32)
        half = theta.copy()
        half[:common] += np.float32(-0.5) * (theta[:common] - theta_sft)
        for alpha, middle in (("-1", weak[name]), ("-0.5", half.astype(BF16)[:common])):
            found = tensors_of(out / f"alpha_{alpha}")[name]
            assert found[3:common].tobytes() == middle[3:].tobytes()
            for kept in (slice(0, 3), slice(common, None)):
                assert found[kept].tobytes() == strong[name][kept].tobytes()


def test_tied_weights_stay_tied(tmp_path):
    write(tmp_path, tiny_config(tied=True))
    assert HEAD not in tensors_of(run(tmp_path))
    for side in ("weak", "strong"):
        arrays = tensors_of(tmp_path / side)
        for file in (tmp_path / side).glob("model*"):
            file.unlink()
        arrays[HEAD] = arrays[EMBED].copy()
        save_file(arrays, tmp_path / side / "model.safetensors", metadata={"format": "pt"})
    out = run(tmp_path, f"--out={tmp_path / 'copies'}", "--alpha.embeddings=0.7")
    found = bytes_in(out)
    assert found[HEAD] == found[EMBED] == expected(tmp_path, 0.7)[EMBED]
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    out = run(tmp_path, f"--out={tmp_path / 'table'}", '--alpha.table={"embed_tokens": -1}')
    weak = bytes_in(tmp_path / "weak")
    assert bytes_in(out)[HEAD] == bytes_in(out)[EMBED] == weak[EMBED]
    with pytest.raises(ValueError, match="'lm_head' matches no tensor; "):
        run(tmp_path, f"--out={tmp_path / 'no'}", '--alpha.table={"lm_head": 0}')


@pytest.mark.parametrize("name", ["mistral_7b", "gemma_2b", "qwen2.5_0.5b", "qwen3_0.6b"])
def test_each_family(tmp_path, name):
    write(tmp_path, tiny(name), dtype="bfloat16")
    assert bytes_in(run(tmp_path)) == expected(tmp_path, 0.3, "bfloat16")


def test_a_reward_model(tmp_path):
    write(tmp_path, tiny("llama3_8b", scored=True))
    found = bytes_in(run(tmp_path))
    assert found == expected(tmp_path, 0.3) and "score.weight" in found


@pytest.mark.parametrize("weak_form", ["hf", "orbax"])
@pytest.mark.parametrize("strong_form", ["hf", "orbax"])
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_every_form_in_and_out(tmp_path, weak_form, strong_form, to):
    write(tmp_path, dtype="bfloat16")
    sides = []
    for side, form in (("weak", weak_form), ("strong", strong_form)):
        place = tmp_path / side
        if form == "orbax":
            place = tmp_path / f"{side}-orbax"
            arguments = [f"--src={tmp_path / side}", f"--dst={place}", "--to=orbax"]
            convert.convert(convert.parse(arguments))
        sides.append(f"--{side}={place}")
    out = run(tmp_path, *sides, f"--to={to}")
    if to == "orbax":
        restored = ocp.StandardCheckpointer().restore(out / "weights")
        assert restored["blocks.gate"].shape == (3, 64, 32)
        convert.convert(convert.parse([f"--src={out}", f"--dst={tmp_path / 'back'}"]))
        out = tmp_path / "back"
    assert bytes_in(out) == expected(tmp_path, 0.3, "bfloat16")


def test_runs_saved_on_8_devices_and_on_1_give_the_same(tmp_path):
    """And a run's float32 masters are used, whose delta is below one ulp of bfloat16."""
    write(tmp_path, dtype="float32", size=1e-5)
    found = {}
    for name, shape in (("eight", {"fsdp": 4, "tensor": 2}), ("one", {})):
        mesh(**shape)
        sides = [f"--{side}={save_run(tmp_path, side)}" for side in ("weak", "strong")]
        out = run(tmp_path, *sides, f"--out={tmp_path / name}", "--dtype=bfloat16", alpha="50,4")
        found[name] = [bytes_in(out / f"alpha_{alpha}") for alpha in (50, 4)]
        for side in ("weak", "strong"):
            shutil.rmtree(tmp_path / f"{side}-run")
    assert found["one"] == found["eight"]
    assert found["one"] == [expected(tmp_path, alpha, "bfloat16") for alpha in (50, 4)]


@pytest.mark.parametrize(
    ("dtype", "scale", "alpha"),
    [("float16", 40_000, "20"), ("bfloat16", 1e38, "1000"), ("float32", 1e38, "1000")],
)
def test_what_overflows_is_refused(tmp_path, dtype, scale, alpha):
    write(tmp_path, dtype=dtype)
    change(tmp_path / "strong", lambda name, one: one * (scale if name == Q else 1))
    with pytest.raises(UserError) as error:
        run(tmp_path, alpha=alpha)
    assert str(error.value).startswith(
        f"{tmp_path}/strong: {Q} extrapolated is more than {dtype} can hold; write it as"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["strong", "weak"]


def test_arguments_that_are_refused(tmp_path):
    write(tmp_path)

    def said(*arguments: str, alpha: str = "0.3") -> str:
        with pytest.raises(ValueError) as error:
            run(tmp_path, *arguments, alpha=alpha)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert said("--out=") == "--out: name the directory to write, or give --dry-run."
    assert said(f"--out={tmp_path / 'weak'}") == (
        f"--out={tmp_path}/weak: it is the source; name another directory."
    )
    assert said("--shard-bytes=0").startswith("shard_bytes=0: it must be at least 1 ")
    assert said(alpha="x").startswith("--alpha=x: write numbers")
    assert said("--weak=nowhere").startswith("--weak=nowhere: there is no such file or directory")


def test_a_dry_run_shows_the_report_and_writes_nothing(tmp_path, capsys):
    write(tmp_path)
    run(tmp_path, "--dry-run", "--out=", "--report=whole")
    assert "theta - theta_sft, from all elements" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["strong", "weak"]


def test_work_on_files_does_not_wait_for_flax(tmp_path):
    """It takes a quarter of a second to import, and is for models on devices."""
    write(tmp_path)
    named = ["--weak=weak", "--strong=strong", "--alpha=0.3", "--out=out"]
    code = f"import sys, alignjax.expo as c\nargs = c.parse({named})\nassert c.expo(*args) == 0\n"
    code += "assert 'jax' in sys.modules and 'flax' not in sys.modules"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").is_dir()


def test_help_gives_every_key_its_comment_without_jax():
    code = "import sys, alignjax.expo as c\ntry: c.parse(['--help'])\n"
    code += "except SystemExit: assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.replace("│", " ").split())
    fields = r"^    (\w+): (?:str|configs\.Bytes|bool|Literal\[.*\])(?: = .*)?  # (.*)$"
    for text, prefix, count in (
        ((ROOT / "alignjax/expo.py").read_text(), "", 11),
        (inspect.getsource(Rules), "alpha.", 6),
    ):
        comments = re.findall(fields, text, re.M)
        assert len(comments) == count
        for name, comment in comments:
            assert f"--{prefix}{name.replace('_', '-')} " in words and comment in words


def test_the_command_needs_its_sides():
    with pytest.raises(SystemExit):
        command.parse(["--weak=a", "--alpha=0.3"])
