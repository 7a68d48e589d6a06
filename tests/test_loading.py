"""Loading and converting in several processes: each reads its part, and the result is the same."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import mesh, read_whole, tiny_config, write_model
from running import environment, finish, start
from safetensors.numpy import load_file

from alignjax import command, processes
from alignjax.sharding import use_mesh
from alignjax.weights import tensorfile
from alignjax.weights.loading import load
from alignjax.weights.orbax import open_orbax
from alignjax.weights.orbax_write import write_model as write_orbax
from alignjax.weights.safetensors import open_directory
from alignjax.weights.source import leaf_name

PROCESSES = 4
WIDE = dict(vocab_size=8000, hidden_size=512, heads=8, head_dim=64, mlp_size=2048, layers=2)


def fingerprints(model) -> dict[str, str]:
    """Leaf and place of each shard of this process -> a hash of what it holds."""
    return {
        f"{leaf_name(path)} {shard.index}": hashlib.sha256(np.asarray(shard.data)).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
        for shard in leaf.addressable_shards
    }


def load_and_tell(source: str, broken_on: str = "") -> int:
    """What each process does: loads a model, prints what it read and what it holds."""
    processes.join({})
    use_mesh(1, 4, 2)
    asked = []
    original = tensorfile.read_bytes

    def read_bytes(file, start, content):
        if broken_on == str(jax.process_index()) and len(asked) == 3:
            raise OSError(5, "Input/output error")
        asked.append(len(content))
        return original(file, start, content)

    tensorfile.read_bytes = read_bytes
    model = load(open_directory(Path(source)))
    print(json.dumps({"asked": asked, "shards": fingerprints(model)}))
    return 0


def launched(root: Path, *line: str, count: int = PROCESSES) -> tuple[list[int], list[str]]:
    env = environment(root / "cache", 8 // PROCESSES)
    return finish(start([sys.executable, *line], env, count, root / "logs"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("loading")
    kind = np.dtype(ml_dtypes.bfloat16)
    write_model(root / "model", tiny_config(**WIDE), dtype=kind, files=3)
    return root / "model"


def test_four_processes_read_a_quarter_each_and_hold_the_same(model, tmp_path):
    codes, outputs = launched(tmp_path, __file__, str(model))
    assert codes == [0] * PROCESSES, "\n".join(outputs)
    told = [json.loads(output.splitlines()[-1]) for output in outputs]
    sizes = {
        name: array.nbytes
        for file in model.glob("*.safetensors")
        for name, array in load_file(file).items()
    }
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    whole = sum(sizes.values()) - norms
    for one in told:
        assert sum(one["asked"]) - norms <= 1.05 * whole / PROCESSES
        assert sum(one["asked"]) / len(one["asked"]) >= 1 << 16
    assert sum(sum(one["asked"]) - norms for one in told) == whole
    mesh(1, 4, 2)
    held = {place: digest for one in told for place, digest in one["shards"].items()}
    assert held == fingerprints(load(open_directory(model)))


def test_damage_that_one_process_meets_ends_all_with_one_sentence(model, tmp_path):
    codes, outputs = launched(tmp_path, __file__, str(model), "2")
    assert codes == [2] * PROCESSES, "\n".join(outputs)
    said = [[line for line in output.splitlines() if "error" in line] for output in outputs]
    assert [len(lines) for lines in said] == [1, 0, 0, 0]
    assert said[0][0].startswith(f"error: {model}/model-0000")
    assert said[0][0].endswith(" cannot be read (Input/output error); copy or fetch it again.")


def test_several_processes_convert_there_and_back(model, tmp_path):
    convert = ("-m", "alignjax.convert")
    there = (f"--src={model}", f"--dst={tmp_path}/orbax", "--to=orbax")
    back = (f"--src={tmp_path}/orbax", f"--dst={tmp_path}/back", "--shard-bytes=2000000")
    for line in (there, back):
        codes, outputs = launched(tmp_path, *convert, *line, count=2)
        assert codes == [0, 0], "\n".join(outputs)
        assert "wrote " in outputs[0] and "wrote " not in outputs[1]
    one, other = open_directory(model), open_directory(tmp_path / "back")
    assert {n: t[:2] for n, t in one.tensors.items()} == {
        n: t[:2] for n, t in other.tensors.items()
    }
    for name in one.tensors:
        assert read_whole(one, name).tobytes() == read_whole(other, name).tobytes()
    assert one.config == other.config
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 4
    assert {path.name for path in tmp_path.iterdir()} == {"orbax", "back", "logs"}


def test_a_conversion_that_fails_on_one_process_leaves_nothing(model, tmp_path):
    orbax = write_orbax(open_directory(model), tmp_path / "orbax", "source")
    shutil.copytree(orbax, tmp_path / "cut")
    chunk = tmp_path / "cut/weights/blocks.down/1.0.0"
    chunk.write_bytes(chunk.read_bytes()[:1000])
    with pytest.raises(ValueError):
        read_whole(open_orbax(tmp_path / "cut"), "model.layers.1.mlp.down_proj.weight")
    line = ("-m", "alignjax.convert", f"--src={tmp_path}/cut", f"--dst={tmp_path}/out")
    codes, outputs = launched(tmp_path, *line, "--to=orbax", count=2)
    assert codes == [2, 2], "\n".join(outputs)
    text = f"error: {tmp_path}/cut/weights: model.layers.1.mlp.down_proj.weight cannot be read ("
    assert outputs[0].splitlines()[-1].startswith(text)
    assert {path.name for path in tmp_path.iterdir()} == {"orbax", "cut", "logs"}


if __name__ == "__main__":
    sys.exit(command.run(lambda: load_and_tell(*sys.argv[1:])))
