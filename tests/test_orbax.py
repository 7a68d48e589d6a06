"""Models in Orbax's format: plain Orbax reads what is written, and slices of runs are read."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from conftest import BF16, bytes_of, mesh, read_whole, tiny_config, write_model
from expomodels import save_run
from safetensors.numpy import load_file

from alignjax import checkpoint, optim
from alignjax.config import SFT, Optimizer
from alignjax.models import decoder
from alignjax.models.shapes import leaf_shapes
from alignjax.sharding import to_host
from alignjax.step import State, init_state
from alignjax.weights import orbax, orbax_write
from alignjax.weights.loading import load
from alignjax.weights.safetensors import open_directory, save_companions
from alignjax.weights.source import check_tensors


@pytest.fixture(scope="module")
def run_model() -> dict[int, decoder.Decoder]:
    return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory, run_model) -> Path:
    """A run on eight devices with checkpoints of steps 2 and 10, as training leaves it."""
    mesh(1, 4, 2)
    root = tmp_path_factory.mktemp("run")
    write_model(root / "hf", tiny_config(False), dtype=BF16)
    source = open_directory(root / "hf")
    config = SFT(run_dir=str(root / "run"))
    tx = optim.optimizer(Optimizer(), 10)
    manager = checkpoint.open_manager(config)
    for step in (2, 10):
        model = jax.tree.map(lambda leaf, by=step: leaf * by, load(source))
        state = init_state(model, tx)._replace(step=jnp.int32(step))
        checkpoint.save(manager, state, step, config, None)
        run_model[step] = jax.tree.map(to_host, model)
    manager.wait_until_finished()
    manager.close()
    save_companions(source, root / "run/model")
    assert isinstance(state, State)
    return root / "run"


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        source = orbax.open_orbax(path)
        check_tensors(source)
        for name in source.tensors:
            read_whole(source, name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_slices_are_those_of_the_hugging_face_directory(written):
    theirs, ours = open_directory(written.parent / "hf"), orbax.open_orbax(written)
    assert set(ours.tensors) == set(theirs.tensors)
    for name, stored in ours.tensors.items():
        assert stored[:2] == theirs.tensors[name][:2]
        assert stored.file == written / "weights"
        index = tuple(slice(n // 4, n // 2) for n in stored.shape)
        np.testing.assert_array_equal(ours.read(name, index), theirs.read(name, index))
    mesh(1, 4, 2)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(to_host, load(ours)),
        jax.tree.map(to_host, load(theirs)),
    )


# Training runs


@pytest.mark.parametrize(
    ("place", "step"), [("", 10), ("checkpoints/10", 10), ("checkpoints/2", 2)]
)
def test_a_run_gives_its_latest_checkpoint_or_the_one_named(run, run_model, place, step):
    assert orbax.is_orbax(run / place)
    source = orbax.open_orbax(run / place)
    assert source.path == run / f"checkpoints/{step}"
    assert source.tokenizer_dir == run / "model"
    assert source.config == json.loads((run / "model/config.json").read_text())
    assert {stored.dtype for stored in source.tensors.values()} == {np.dtype(np.float32)}
    jax.tree.map(
        np.testing.assert_array_equal, run_model[step], jax.tree.map(to_host, load(source))
    )


def test_of_a_run_only_the_models_own_arrays_are_opened(run, monkeypatch):
    opened = set()
    original = tensorstore.open

    def spy(spec, **options):
        opened.add(spec["kvstore"]["path"])
        return original(spec, **options)

    monkeypatch.setattr(tensorstore, "open", spy)
    source = orbax.open_orbax(run)
    assert opened == {f"model.{leaf}/" for leaf in leaf_shapes(tiny_config(False))}
    assert all(name.startswith(("model.", "lm_head.")) for name in source.tensors)


def test_rows_of_a_run_are_checked_as_they_are_read(run, tmp_path):
    """The arrays of another step have the right shapes, and are not those that were saved."""
    state = copy_of(run, tmp_path) / "checkpoints/10/state"
    shutil.rmtree(state)
    shutil.copytree(run / "checkpoints/2/state", state)
    source = orbax.open_orbax(tmp_path / "run")
    for name, stored in source.tensors.items():
        rest = (slice(None),) * (len(stored.shape) - 1)
        with pytest.raises(ValueError, match=f"{name} cannot be read .it is not as it was saved"):
            source.read(name, (slice(None) if not rest else slice(3, 5), *rest))


@pytest.mark.parametrize("shape", [(), (5,), (3, 40), (2, 3, 40)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_sums_of_rows_are_the_same_on_the_mesh(shape, dtype):
    leaf = (jax.random.normal(jax.random.key(0), shape) * 100).astype(dtype)
    found = np.asarray(checkpoint._row_sums_of(leaf))
    by_hand = [
        sum(int(x) * (2 * i + 1) for i, x in enumerate(row)) % 2**32
        for row in np.asarray(leaf)
        .reshape(-1, shape[-1] if shape else 1)
        .view(f"uint{8 * leaf.dtype.itemsize}")
    ]
    assert found.ravel().tolist() == by_hand
    assert orbax.row_sums(np.atleast_1d(leaf)).ravel().tolist() == by_hand


def test_the_config_of_a_run_says_float32_whatever_it_started_from(run, tmp_path):
    file = copy_of(run, tmp_path) / "model/config.json"
    file.write_text(file.read_text().replace('"float32"', '"bfloat16"'))
    assert orbax.open_orbax(tmp_path / "run").config["torch_dtype"] == "float32"


def test_a_chunk_is_decoded_once(run, tmp_path, monkeypatch):
    """One cache for all arrays has room for those chunks of one array in which a row lies.

    Where a chunk has several layers, as Orbax alone would save, for those in which layers do.
    """
    limits = []
    original = tensorstore.Context

    def spy(*spec):
        limits.extend(s["cache_pool"]["total_bytes_limit"] - orbax._SPARE_CACHE for s in spec)
        return original(*spec)

    by_layer = orbax_write.write_model(orbax.open_orbax(run), tmp_path / "by-layer", "source")
    write_model(tmp_path / "weak", tiny_config(False))
    monkeypatch.setattr(checkpoint, "_chunks", lambda leaves: None)
    mesh(1, 4, 2)
    all_layers = save_run(tmp_path, "weak")
    monkeypatch.setattr(tensorstore, "Context", spy)
    for path in (run, by_layer, all_layers):
        orbax.open_orbax(path)
    # Half of the embedding's rows; all of them; an MLP weight of all layers.
    assert limits == [4 * 64 * 32, 4 * 128 * 32, 4 * 3 * 64 * 32]


def test_a_run_saves_each_layer_in_chunks_of_its_own(run):
    found = orbax._open_arrays(orbax._place(run))
    for leaf in ("blocks.q", "blocks.gate", "blocks.down"):
        shape, chunk = found[leaf].shape, found[leaf].chunk_layout.read_chunk.shape
        assert chunk == (1, shape[1] // 4, shape[2] // 2) or chunk == (
            1,
            shape[1] // 2,
            shape[2] // 4,
        )


def test_rows_that_pad_the_vocabulary_are_no_part_of_a_run(tmp_path):
    """On the devices, and so in a run's checkpoint, there are more rows than tokens."""
    c = tiny_config(False, vocab_size=100)
    tensors = write_model(tmp_path / "hf", c)
    source = open_directory(tmp_path / "hf")
    model = load(source)
    padding = model.embed.shape[0] - 100
    assert padding > 0 and model.head.shape == model.embed.shape
    assert not model.embed[100:].any() and not model.head[100:].any()
    config = SFT(run_dir=str(tmp_path / "run"))
    manager = checkpoint.open_manager(config)
    checkpoint.save(manager, init_state(model, optim.optimizer(Optimizer(), 10)), 1, config, None)
    manager.wait_until_finished()
    manager.close()
    save_companions(source, tmp_path / "run/model")
    found = orbax.open_orbax(tmp_path / "run")
    check_tensors(found)
    assert bytes_of({n: read_whole(found, n) for n in tensors}) == bytes_of(tensors)
    jax.tree.map(np.testing.assert_array_equal, load(found), model)
    orbax_write.write_model(found, tmp_path / "out", "source")
    restored = ocp.StandardCheckpointer().restore(tmp_path / "out/weights")
    assert restored["embed"].shape == restored["head"].shape == (100, 32)


def test_a_path_that_goes_up(run, written, monkeypatch):
    for path in (run, run / "checkpoints/2", run / "checkpoints/..", written):
        there = path.parent / "beside"
        there.mkdir(exist_ok=True)
        monkeypatch.chdir(there)
        found = orbax.open_orbax(Path("..") / path.name)
        assert read_whole(found, "model.norm.weight").any()
        there.rmdir()


def test_directories_beside_checkpoints_that_are_none(run, tmp_path):
    for name in ("²", "٤٢", "12.old"):  # digits too, by Unicode
        (copy_of(run, tmp_path / name) / "checkpoints" / name).mkdir()
        source = orbax.open_orbax(tmp_path / name / "run")
        assert source.path.name == "10"


def test_a_checkpoint_without_its_sums(run, tmp_path):
    copy = copy_of(run, tmp_path)
    shutil.rmtree(copy / "checkpoints/10/sums")
    assert refusal(copy).startswith(f"{copy}/checkpoints/10/sums: _METADATA cannot be read")


def test_a_run_without_its_model_directory(run, tmp_path):
    copy = copy_of(run, tmp_path)
    shutil.rmtree(copy / "model")
    assert refusal(copy) == (
        f"{copy}/checkpoints/10: there is no {copy}/model/config.json, which says what model this "
        "is; copy the config.json and tokenizer files of the model that the run started from there."
    )


def test_a_run_without_a_checkpoint(run, tmp_path):
    copy = copy_of(run, tmp_path)
    sentence = f"{copy}: the run has no checkpoint yet; wait until it has saved one."
    for step in (2, 10):
        shutil.rmtree(copy / f"checkpoints/{step}")
    (copy / "checkpoints/11.orbax-checkpoint-tmp").mkdir()
    assert refusal(copy) == sentence
    shutil.rmtree(copy / "checkpoints")
    assert orbax.is_orbax(copy) and refusal(copy) == sentence


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "uncommitted"])
@pytest.mark.parametrize("place", ["checkpoints/10", "weights"])
def test_a_checkpoint_that_is_not_whole(run, written, tmp_path, place, how):
    path = written if place == "weights" else copy_of(run, tmp_path)
    file = path / place / "_CHECKPOINT_METADATA"
    found = json.loads(file.read_text()) | {"commit_timestamp_nsecs": None}
    if how == "missing":
        file.unlink()
    else:
        text = {"empty": "", "cut": file.read_text()[:40], "uncommitted": json.dumps(found)}
        file.write_text(text[how])
    assert refusal(path) == (
        f"{path / place}: the checkpoint is not whole (_CHECKPOINT_METADATA is missing or half "
        "written); delete it, or name another one."
    )


def test_no_damage_to_arrays_goes_unnoticed(written):
    """Every file that holds arrays or says where they are, gone or cut, is one sentence."""
    weights = written / "weights"
    leave = ("_CHECKPOINT_METADATA", "commit_success.txt")
    refused = 0
    for file in [f for f in weights.rglob("*") if f.is_file() and f.name not in leave]:
        content = file.read_bytes()
        for damaged in (None, content[: len(content) // 2]):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            try:
                source = orbax.open_orbax(written)
                for name, stored in open_directory(written.parent / "hf").tensors.items():
                    array = read_whole(source, name)
                    assert array.shape == stored.shape
            except ValueError as error:
                text = str(error)
                assert text.startswith(f"{weights}: ") and "\n" not in text
                assert " cannot be read (" in text and text.endswith("copy the checkpoint again.")
                refused += 1
            file.write_bytes(content)
    assert refused >= 6  # _METADATA, the manifest, the tree and the chunks; not each process's own


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_every_layout_that_orbax_writes(written, zarr3, ocdbt):
    leaves = ocp.StandardCheckpointer().restore(written / "weights")
    shutil.rmtree(written / "weights")
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(written / "weights", leaves)
    found = json.loads((written / "weights/_METADATA").read_text())
    assert (found["use_ocdbt"], found["use_zarr3"]) == (ocdbt, zarr3)
    source = orbax.open_orbax(written)
    for name, stored in open_directory(written.parent / "hf").tensors.items():
        expected = load_file(stored.file)[name]
        assert read_whole(source, name).tobytes() == expected.tobytes()
    if ocdbt:
        return
    chunk = max((written / "weights/embed").rglob("*"), key=lambda file: file.stat().st_size)
    chunk.unlink()  # zarr would read what is gone as zeros
    text = refusal(written)
    assert text.startswith(f"{written}/weights: model.embed_tokens.weight cannot be read (")


def test_a_path_with_signs_that_mean_something_in_an_address(written, tmp_path):
    odd = tmp_path / "a b%20c#d?e"
    written.rename(odd)
    source = orbax.open_orbax(odd)
    assert read_whole(source, "model.norm.weight").shape == (32,)


def test_missing_and_strange_leaves(written):
    leaves = ocp.StandardCheckpointer().restore(written / "weights")
    for change, sentence in (
        ({"norm": None}, f"{written}: the tensor model.norm.weight is missing."),
        (
            {"blocks.q": leaves["blocks.q"][:2]},
            f"{written}/weights: blocks.q has shape (2, 32, 32), but the config says 3 layers.",
        ),
        (
            {"norm": np.ones(31, np.float32)},
            f"{written}/weights: model.norm.weight has shape (31,), but the config says (32,).",
        ),
        (
            {"norm": np.ones(32, np.int32)},
            f"{written}/weights: norm has dtype int32; supported: float32, float16, bfloat16.",
        ),
        (
            dict.fromkeys(leaves) | {"scale": np.ones(3)},
            f"{written}/weights: it holds none of a model's arrays, such as embed.",
        ),
    ):
        shutil.rmtree(written / "weights")
        changed = {n: leaf for n, leaf in (leaves | change).items() if leaf is not None}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(written / "weights", changed)
        assert refusal(written) == sentence


def test_a_model_directory_without_config(written):
    (written / "config.json").unlink()
    sentence = f"{written}: there is no config.json, so this is not a model directory."
    assert refusal(written) == sentence


@pytest.mark.parametrize(
    ("file", "keys", "change", "key"),
    [
        (orbax._COMMIT, [], {"custom_metadata": [1]}, "custom_metadata"),
        (orbax._COMMIT, [], {"custom_metadata": {"dtypes": {"x": "float64"}}}, "dtypes.x"),
        (orbax._COMMIT, [], {"custom_metadata": {"dtypes": ["float32"]}}, "dtypes"),
        ("_METADATA", [], {"tree_metadata": [1]}, "_METADATA cannot be read"),
        ("_METADATA", ["tree_metadata"], {"x": {"key_metadata": 5}}, "_METADATA cannot be read"),
        ("_METADATA", ["tree_metadata"], {"x": {"key_metadata": [{}]}}, "_METADATA"),
        ("blocks.q/.zarray", [], {"shape": [], "chunks": []}, "blocks.q cannot be read"),
        (
            "blocks.q/.zarray",
            [],
            {"shape": [10**9, 32, 32]},
            "blocks.q has shape (1000000000, 32, 32)",
        ),
        ("norm/.zarray", [], {"shape": [], "chunks": []}, "norm cannot be read"),
        ("norm/.zarray", [], {"shape": "x"}, "norm cannot be read"),
    ],
)
def test_metadata_of_other_types(written, file, keys, change, key):
    at = written / "weights" / file
    held = found = json.loads(at.read_text())
    for name in keys:
        found = found[name]
    found.update(change)
    at.write_text(json.dumps(held))
    text = refusal(written)
    assert text.startswith(f"{written}/weights") and key in text


def test_a_noted_dtype_that_the_numbers_do_not_have(tmp_path):
    write_model(tmp_path / "hf", tiny_config())
    written = orbax_write.write_model(open_directory(tmp_path / "hf"), tmp_path / "m", "source")
    at = written / "weights" / orbax._COMMIT
    noted = {"custom_metadata": {"dtypes": {"model.norm.weight": "bfloat16"}}}
    at.write_text(json.dumps(json.loads(at.read_text()) | noted))
    assert "model.norm.weight is not of bfloat16" in refusal(written)


@pytest.mark.parametrize("name", ["_METADATA", orbax._COMMIT, "norm/0"])
def test_a_file_that_leads_to_a_pipe(written, name):
    (written / "weights" / name).unlink()
    os.mkfifo(written / "weights" / name)
    assert refusal(written).startswith(f"{written}/weights")


@pytest.mark.parametrize(
    ("leaf", "how"),
    [
        ("blocks.q", {"order": "F"}),
        ("embed", {"order": "F"}),
        ("embed", {"dtype": ">f4"}),
        ("norm", {"dtype": ">f4"}),
        ("blocks.q", {"order": "F", "dtype": ">f4"}),
    ],
)
def test_arrays_of_another_order_are_read_as_the_same_numbers(tmp_path, how, leaf):
    tensors = write_model(tmp_path / "hf", tiny_config())
    source = open_directory(tmp_path / "hf")
    written = orbax_write.write_model(source, tmp_path / "m", "source")
    directory = written / "weights" / leaf
    held = json.loads((directory / ".zarray").read_text())
    place = {"driver": "file", "path": f"{directory}/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": place}).result().read().result()
    spec = {"driver": "zarr", "kvstore": place, "metadata": held | how}
    turned = tensorstore.open(spec, create=True, delete_existing=True).result()
    turned.write(array).result()
    assert json.loads((directory / ".zarray").read_text()).items() >= how.items()
    again = orbax.open_orbax(written)
    check_tensors(again)
    for name, expected in tensors.items():
        got = again.read(name, (slice(3, 20), *(slice(1, 9),) * (expected.ndim - 1)))
        np.testing.assert_array_equal(
            got, expected[(slice(3, 20), *(slice(1, 9),) * (expected.ndim - 1))]
        )
