"""The conversion command as a user runs it, and each direction byte for byte."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import tiny_config, write_model
from gguffiles import write_gguf
from presets import tiny
from safetensors.numpy import load_file

from alignjax import checkpoint, optim
from alignjax import convert as command
from alignjax.config import SFT, Optimizer
from alignjax.models.shapes import leaf_shapes
from alignjax.step import init_state
from alignjax.weights.loading import load
from alignjax.weights.safetensors import open_directory, save_companions
from alignjax.weights.source import decoder_config

ROOT = Path(__file__).resolve().parents[1]


def launch(*arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1", "XLA_FLAGS": ""}
    env |= {"ALIGNJAX_CACHE": str(cache)} if cache else {}
    line = [sys.executable, "-m", "alignjax.convert", *arguments]
    return subprocess.run(line, env=env, capture_output=True, text=True, check=False)


def ends_well(src: Path, dst: Path, *more: str) -> str:
    """The last line of what a conversion prints."""
    done = launch(f"--src={src}", f"--dst={dst}", *more, cache=src.parent / "cache")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()[-1]


def refusal(src: Path | str, dst: Path, *more: str) -> str:
    """The sentence of a conversion that is refused, which leaves nothing behind."""
    parent = next(path for path in dst.parents if path.exists())
    there = sorted(parent.iterdir())
    with pytest.raises(ValueError) as error:
        arguments = command.parse([f"--src={src}", f"--dst={dst}", *more])
        command.check(arguments)
        command.convert(arguments)
    assert sorted(parent.iterdir()) == there
    assert "\n" not in str(error.value)
    return str(error.value)


def tensors_of(directory: Path) -> dict[str, tuple]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return {name: (array.dtype, array.tobytes()) for name, array in found.items()}


def assert_same_but_weights(one: Path, two: Path) -> None:
    names = {path.name for path in one.iterdir() if "safetensors" not in path.name}
    assert {path.name for path in two.iterdir() if "safetensors" not in path.name} == names
    for name in names - {"config.json"}:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    configs = [json.loads((path / "config.json").read_text()) for path in (one, two)]
    assert configs[0] == configs[1]


@pytest.fixture
def model(tmp_path) -> Path:
    kind = np.dtype(ml_dtypes.bfloat16)
    write_model(tmp_path / "model", tiny_config(), dtype=kind, files=2)
    return tmp_path / "model"


def test_hugging_face_to_orbax_and_back_by_the_command(model, tmp_path):
    line = ends_well(model, tmp_path / "orbax", "--to=orbax")
    pattern = (
        rf"wrote {tmp_path}/orbax, an Orbax model directory: 29 tensors in bfloat16, 0\.1 MB "
        r"read in \d+\.\d s \(\d\.\d{3} GB/s\)"
    )
    assert re.fullmatch(pattern, line)
    restored = ocp.StandardCheckpointer().restore(tmp_path / "orbax/weights")
    assert restored["blocks.gate"].shape == (3, 64, 32)

    line = ends_well(tmp_path / "orbax", tmp_path / "back", "--shard-bytes=20000")
    assert line.startswith(f"wrote {tmp_path}/back, a Hugging Face directory: 29 tensors in bf")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert tensors_of(tmp_path / "back") == tensors_of(model)
    assert_same_but_weights(model, tmp_path / "back")


FAMILIES = {
    "llama 2": tiny("llama2_7b", vocab_size=131),
    "llama 3.1": tiny("llama3.1_8b"),
    "llama 3.2": tiny("llama3.2_1b"),
    "mistral": tiny("mistral_7b"),
    "gemma": tiny("gemma_2b"),
    "qwen 2.5": tiny("qwen2.5_0.5b"),
    "qwen 3": tiny("qwen3_0.6b"),
    "a reward model": tiny("mistral_7b", scored=True),
}


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_to_orbax_and_back(tmp_path, name, kind):
    c = FAMILIES[name]
    write_model(tmp_path / "model", c, dtype=np.dtype(kind))
    ends_well(tmp_path / "model", tmp_path / "orbax", "--to=orbax")
    ends_well(tmp_path / "orbax", tmp_path / "back")
    stored = tensors_of(tmp_path / "back")
    assert stored == tensors_of(tmp_path / "model")
    assert ("score.weight" in stored, "lm_head.weight" in stored) == (
        c.scored,
        not c.scored and not c.tied_head,
    )
    assert_same_but_weights(tmp_path / "model", tmp_path / "back")
    assert decoder_config(open_directory(tmp_path / "back")) == c


def test_a_run_to_hugging_face_by_the_command(model, tmp_path):
    """The weights that were trained, and nothing of the optimizer."""
    source = open_directory(model)
    state = init_state(load(source), optim.optimizer(Optimizer(), 10))
    trained = state._replace(model=state.model, step=jnp.int32(5))
    manager = checkpoint.open_manager(SFT(run_dir=str(tmp_path / "run")))
    checkpoint.save(manager, trained, 5, SFT(), None)
    manager.wait_until_finished()
    manager.close()
    save_companions(source, tmp_path / "run/model")
    line = ends_well(tmp_path / "run", tmp_path / "out")
    assert line.startswith(f"wrote {tmp_path}/out, a Hugging Face directory: 29 tensors in float32")
    expected = {}
    for file in model.glob("*.safetensors"):
        expected |= load_file(file)
    assert tensors_of(tmp_path / "out") == {
        name: (np.float32, array.astype(np.float32).tobytes()) for name, array in expected.items()
    }
    assert_same_but_weights(tmp_path / "run/model", tmp_path / "out")


def test_gguf_to_hugging_face_by_the_command(tmp_path):
    _, tensors = write_gguf(tmp_path / "tiny.gguf")
    ends_well(tmp_path / "tiny.gguf", tmp_path / "out", "--dtype=bfloat16")
    got = load_file(tmp_path / "out/model.safetensors")
    assert set(got) == set(tensors)
    for name, array in tensors.items():
        assert got[name].tobytes() == array.astype(ml_dtypes.bfloat16).tobytes()
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_hugging_face_to_hugging_face_is_a_copy(model, tmp_path, capsys):
    args = command.parse([f"--src={model}", f"--dst={tmp_path / 'out'}"])
    (tmp_path / "out").mkdir()  # an empty one may be there
    assert command.convert(args) == 0
    assert tensors_of(tmp_path / "out") == tensors_of(model)
    assert_same_but_weights(model, tmp_path / "out")
    assert "converting (GB)" in capsys.readouterr().out


def test_orbax_to_orbax(model, tmp_path):
    for src, dst in (("model", "one"), ("one", "two")):
        command.convert(
            command.parse([f"--src={tmp_path / src}", f"--dst={tmp_path / dst}", "--to=orbax"])
        )
    one, two = (
        ocp.StandardCheckpointer().restore(tmp_path / name / "weights") for name in ("one", "two")
    )
    assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in two.items()}
    assert len(one) == 11


def test_destinations_that_are_refused(model, tmp_path):
    sentence = "it is there already; delete it, or name another one."
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("")
    assert refusal(model, full) == f"--dst={full}: {sentence}"
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    assert refusal(model, full / "mine.txt") == f"--dst={full}/mine.txt: {sentence}"
    link = tmp_path / "link"
    link.symlink_to(model)
    for same in (model, link, tmp_path / "x" / ".." / "model"):
        (tmp_path / "x").mkdir(exist_ok=True)
        assert refusal(model, same) == f"--dst={same}: it is the source; name another directory."
    assert tensors_of(model)
    said = refusal(model, tmp_path / "out", "--shard-bytes=0")
    assert said.startswith("shard_bytes=0: it must be at least 1 ")


def test_a_disk_without_room_is_refused_before_anything_is_written(model, tmp_path, monkeypatch):
    asked = []

    def disk_usage(path):
        asked.append(path)
        return shutil._ntuple_diskusage(10**9, 10**9, 30_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    need = {"source": 2, "float32": 4}
    weights = sum(np.prod(shape) for shape in leaf_shapes(tiny_config()).values())
    for dtype, size in need.items():
        assert refusal(model, tmp_path / "new/out", f"--dtype={dtype}") == (
            f"--dst={tmp_path}/new/out: it needs {weights * size / 1e6:.1f} MB, and 0.0 MB are "
            "free; free some space, or name another disk."
        )
    assert asked == [tmp_path, tmp_path]


def test_a_file_that_cannot_be_written(model, tmp_path):
    """A limit on the size of files stands for a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        text = refusal(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.fullmatch(
        rf"{tmp_path}/\.out\.[^/]*\.partial/model\.safetensors: the file could not be written "
        r"\(File too large\); see to the disk\.",
        text,
    )


def test_sources_that_are_refused(model, tmp_path):
    out = tmp_path / "out"
    assert refusal(tmp_path / "none", out) == (
        f"--src={tmp_path}/none: there is no such file or directory, and it is neither ORG/NAME on "
        "the hub nor one of: smollm2-135m-instruct."
    )
    config = model / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mamba"'))
    for to in ("hf", "orbax"):
        text = refusal(model, out, f"--to={to}")
        assert text.startswith(f"{model}: model_type 'mamba' is not supported; supported: ")


def test_a_shard_that_breaks_off_while_it_is_read(model, tmp_path):
    """Damage that shows late leaves no destination."""
    command.convert(command.parse([f"--src={model}", f"--dst={tmp_path / 'orbax'}", "--to=orbax"]))
    chunk = tmp_path / "orbax/weights/blocks.gate/2.0.0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    for to in ("hf", "orbax"):
        text = refusal(tmp_path / "orbax", tmp_path / "out", f"--to={to}")
        name = "model.layers.2.mlp.gate_proj.weight"
        assert text.startswith(f"{tmp_path}/orbax/weights: {name} cannot be read (")


def test_a_mistake_is_one_sentence_and_exit_code_2(model, tmp_path):
    (model / "model-00002-of-00002.safetensors").unlink()
    done = launch(f"--src={model}", f"--dst={tmp_path / 'out'}")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {model}/model.safetensors.index.json: it names the file "
        f"'model-00002-of-00002.safetensors', which is not in {model}, for "
        "model.layers.0.input_layernorm.weight.\n",
    )
    shutil.rmtree(model)
    done = launch(f"--src={model}")
    assert done.returncode == 2 and "Missing" in done.stderr and "--dst" in done.stderr


def test_help_gives_every_key_its_comment_without_jax():
    code = "import sys, alignjax.convert as c\ntry: c.parse(['--help'])\n"
    code += "except SystemExit: assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.replace("│", " ").split())
    source = (ROOT / "alignjax/convert.py").read_text()
    comments = re.findall(r"^    (\w+): .*  # (.*)$", source, re.M)
    assert [name for name, _ in comments] == [
        *("src", "dst", "to", "dtype", "shard_bytes", "check")
    ]
    for name, comment in comments:
        assert f"--{name.replace('_', '-')} " in words and comment in words
