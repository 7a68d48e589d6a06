"""Files of safetensors that are damaged, or none: refused before anything is made of them."""

import pickle
import resource

import numpy as np
import pytest
from conftest import tiny_config, write_model
from safetensors.numpy import load_file, save_file

from alignjax.weights import tensorfile
from alignjax.weights.loading import load
from alignjax.weights.safetensors import open_directory, write_directory


def refusal(directory) -> str:
    with pytest.raises(ValueError) as error:
        load(open_directory(directory))
    return str(error.value)


@pytest.mark.parametrize("keep", [slice(-1000), slice(-1), slice(100), slice(4), slice(0)])
@pytest.mark.parametrize("files", [1, 3])
def test_a_file_cut_short_is_refused_on_opening(tmp_path, files, keep):
    write_model(tmp_path, tiny_config(), files=files)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    held = load_file(file)
    file.write_bytes(file.read_bytes()[keep])
    with pytest.raises(ValueError) as error:
        open_directory(tmp_path)
    first, _, rest = str(error.value).partition(" (")
    assert first == f"{file}: this is not a whole safetensors file"
    assert rest.endswith("); copy or fetch it again.") and "\n" not in rest
    if keep.stop in (-1, -1000):
        left = -keep.stop
        for name in sorted(held, reverse=True):  # the last one lies last
            left -= held[name].nbytes
            if left <= 0:
                break
        assert f"; it ends within {name});" in rest
    else:
        assert "within" not in rest


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.float64])
def test_a_dtype_that_is_not_a_weights(tmp_path, kind):
    tensors = write_model(tmp_path, tiny_config())
    name, file = "model.norm.weight", tmp_path / "model.safetensors"
    save_file(tensors | {name: tensors[name].astype(kind)}, file)
    code = f"{'F' if kind is np.float64 else 'I'}{8 * kind().itemsize}"
    sentence = f"{file}: {name} has dtype {code}; supported: F32, F16, BF16."
    assert refusal(tmp_path) == sentence


class Trap:
    """A pickle of it, opened, leaves a file."""

    def __reduce__(self):
        return open, ("opened", "w")


@pytest.mark.parametrize("what", ["2^60", "pickle", "zip"])
def test_what_is_no_safetensors_file_at_all(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m", tiny_config())
    file = tmp_path / "m/model.safetensors"
    content = file.read_bytes()
    wrong = {
        "2^60": (1 << 60).to_bytes(8, "little") + content[8:],
        "pickle": pickle.dumps(Trap()),
        "zip": b"PK\x03\x04" + content,
    }
    file.write_bytes(wrong[what])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = refusal(tmp_path / "m")
    assert text.startswith(f"{file}: this is not a whole safetensors file (Error while des")
    assert text.endswith("); copy or fetch it again.") and "\n" not in text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path):
    write_model(tmp_path / "m", tiny_config())
    source = open_directory(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    for work in (load, lambda source: write_directory(source, tmp_path / "out", "source", 10**9)):
        with pytest.raises(ValueError) as error:
            work(source)
        assert str(error.value) == (
            f"{file}: model.norm.weight cannot be read (the file has become shorter); copy or "
            "fetch it again."
        )
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_parts_of_a_tensor(tmp_path, monkeypatch):
    """Rows are read as they lie, in one call; a scalar is a tensor too."""
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((40, 6, 2)), "b": rng.standard_normal(7), "c": np.ones(())}
    tensors = {name: array.astype(np.float16) for name, array in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    asked = []
    original = tensorfile.read_bytes
    monkeypatch.setattr(
        tensorfile, "read_bytes", lambda *what: asked.append(len(what[2])) or original(*what)
    )
    held = tensorfile.read_header(tmp_path / "x.safetensors")
    for name, index, size in (
        ("a", (slice(3, 9), slice(None), slice(None)), 6 * 24),
        ("a", (slice(3, 9), slice(2, 4), slice(1, 2)), 6 * 24),
        ("a", (slice(38, 90), slice(None), slice(None)), 2 * 24),
        ("a", (slice(5, 5), slice(None), slice(None)), 0),
        ("b", (slice(None),), 14),
        ("c", (), 2),
    ):
        got = tensorfile.read_tensor(tmp_path / "x.safetensors", name, held[name], index)
        expected = tensors[name][index]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert (got.tobytes(), asked.pop()) == (expected.tobytes(), size)
    assert not asked


def test_a_file_that_is_written_is_what_the_package_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "WRITE", 100)
    rng = np.random.default_rng(0)
    tensors = {"w": rng.standard_normal((40, 6)).astype(np.float32), "v": np.ones(3, np.float16)}
    header = tensorfile.header_of({n: (a.shape, a.dtype) for n, a in tensors.items()})
    parts = [header, tensors["w"][:7], np.asfortranarray(tensors["w"][7:]), tensors["v"]]
    tensorfile.write_file(tmp_path / "x", parts)
    got = load_file(tmp_path / "x")
    assert {n: a.tobytes() for n, a in got.items()} == {n: a.tobytes() for n, a in tensors.items()}
    assert len(header) % 8 == 0
