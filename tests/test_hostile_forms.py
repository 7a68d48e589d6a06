"""Files that lie, in thousands of forms: each is accepted or refused in one sentence."""

import dataclasses
import json
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import datasets
import gguffiles
import numpy as np
import pytest
from conftest import hf_config, tiny_config, write_model
from datafiles import read
from gguffiles import write_gguf

from alignjax import companions, metrics, resume, samples
from alignjax import config as configs
from alignjax import run as runs
from alignjax.data.tokenset import in_memory
from alignjax.errors import sentence_of
from alignjax.models.families import FAMILIES, from_hf
from alignjax.stages import stage_of
from alignjax.weights import fetch
from alignjax.weights.orbax_write import write_model as write_orbax
from alignjax.weights.source import check_tensors

# What a refused form leaves open is closed by the end of its command.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SECONDS, BYTES = 120, 6 << 30  # against hanging alone: a form takes milliseconds
DEEP = json.loads("[" * 200 + "]" * 200)
WRONG = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 0.5, 1e308, float("nan")),
    *(float("inf"), "", "x", "silu", "\x1b[31m\u202e", "../x", "9" * 5000),
    *([], [1], ["x"], [None], [[]], {}, {"a": 1}, {"factor": 0}, DEEP),
]
DOCUMENTS = ["", "{", "null", "1", '"x"', "[]", "[[]]", "[{}]", "NaN", "\ufeff{}", "[" * 100_000]
DOCUMENTS += ['{"a": 1}{}', "\x00", '{"a": 1e999}', b"\xff\xfe{\x00}\x00", b"\x80", b"\x1f\x8b\x08"]


class Late(BaseException):
    """No reader catches it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Time and memory that a form may take, so that one which hangs does not take the machine."""

    def late(number, frame):
        raise Late(f"no end within {SECONDS} s")

    older = signal.signal(signal.SIGALRM, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, older)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def check(forms: dict[str, Callable[[], object]]) -> None:
    """Fails with the list of forms that are neither accepted nor refused in one line."""
    found = []
    for name, work in forms.items():
        try:
            with bounded():
                work()
        except (Exception, Late) as error:
            sentence = sentence_of(error)
            if not sentence or "\n" in sentence:
                found.append(f"{name}: {type(error).__name__}: {str(error)[:100]}")
    if found:
        pytest.fail(f"{len(found)} of {len(forms)} forms:\n" + "\n".join(found), pytrace=False)


def shown(value) -> str:
    return repr(value)[:40]


def changed(content: dict, keys: list[str]) -> Iterator[tuple[str, dict]]:
    """The content with each key ("outer/0/inner") of each wrong value, or without it."""
    for key in keys:
        *outer, last = [int(part) if part.isdigit() else part for part in key.split("/")]
        for value in [*WRONG, ...]:
            copy = json.loads(json.dumps(content))
            inner = copy
            for name in outer:
                inner = inner[name] if name in inner or name == 0 else inner.setdefault(name, {})
            if value is ... and last in inner:
                del inner[last]
            elif value is ...:
                continue
            else:
                inner[last] = value
            yield f"{key}={shown(value)}", copy


def files(file: Path, content: dict, keys: list[str], work: Callable[[], object]) -> dict:
    """A JSON file in every form, each read by `work`, which accepts the good one."""
    file.write_text(json.dumps(content))
    work()

    def form(text: str | bytes) -> Callable[[], object]:
        def write_and_work():
            file.write_bytes(text.encode() if isinstance(text, str) else text)
            return work()

        return write_and_work

    texts = {name: json.dumps(copy) for name, copy in changed(content, keys)}
    texts |= {f"the file {shown(text)}": text for text in DOCUMENTS}
    return {f"{file.name}: {name}": form(text) for name, text in texts.items()}


ROPE = ["rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "type"]
ROPE += ["original_max_position_embeddings", "partial_rotary_factor"]
CONFIG = ["architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers"]
CONFIG += ["num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"]
CONFIG += ["hidden_act", "hidden_activation", "rms_norm_eps", "tie_word_embeddings", "rope_theta"]
CONFIG += ["rope_parameters", "rope_scaling", "sliding_window", "layer_types", "id2label", "dtype"]
CONFIG += ["num_labels", "attention_bias", "mlp_bias", "quantization_config", "auto_map"]
CONFIG += ["partial_rotary_factor", "use_sliding_window", "num_experts", "mlp_only_layers"]
CONFIG += ["eos_token_id", "pad_token_id", "bos_token_id", "torch_dtype", "max_window_layers"]
CONFIG += [f"rope_parameters/{key}" for key in ROPE] + [f"rope_scaling/{key}" for key in ROPE]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("forms") / "model"
    write_model(directory, tiny_config(), files=2)
    return directory


@pytest.fixture
def copied(model, tmp_path) -> Path:
    """A directory of links to the model's files."""
    target = tmp_path / "model"
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def opened(path: Path, cache: Path):
    source = fetch.open_model(str(path), cache)
    check_tensors(source)
    return source


@pytest.mark.parametrize("family", FAMILIES)
def test_config_of_a_family(model, family):
    source = fetch.open_model(str(model), model)
    base = hf_config(tiny_config()) | {"model_type": family}

    def work(config: dict):
        from_hf(config, "config.json")
        if family == "llama":
            check_tensors(dataclasses.replace(source, config=config))

    forms = {name: lambda c=copy: work(c) for name, copy in changed(base, CONFIG)}
    assert len(forms) > 1000
    check(forms)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("config.json", ["vocab_size", "rope_parameters"]),
        ("generation_config.json", ["eos_token_id", "pad_token_id"]),
        ("model.safetensors.index.json", ["weight_map", "weight_map/model.norm.weight"]),
    ],
)
def test_json_of_a_model_directory(copied, tmp_path, monkeypatch, name, keys):
    monkeypatch.setattr(companions, "end_of_turn_id", lambda tokenizer: 2)
    ends = SimpleNamespace(eos_token_id=2)
    forms = files(
        copied / name,
        json.loads((copied / name).read_text()),
        keys,
        lambda: companions.eos_ids(opened(copied, tmp_path), ends),
    )
    check(forms)


TOKENIZER = ["chat_template", "eos_token", "tokenizer_class", "auto_map", "added_tokens_decoder"]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("tokenizer_config.json", TOKENIZER),
        ("tokenizer.json", ["model", "model/vocab", "added_tokens", "pre_tokenizer", "decoder"]),
        ("special_tokens_map.json", ["eos_token"]),
    ],
)
def test_json_of_a_tokenizer(copied, name, keys):
    from alignjax.data.chat import load_tokenizer

    file = copied / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    check(files(file, content, keys, lambda: load_tokenizer(copied, "")))


def test_headers_of_safetensors(copied, tmp_path):
    file = copied / "model-00001-of-00002.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    tensor = next(name for name in header if name != "__metadata__")

    def form(text: bytes, size: int | None = None) -> Callable[[], object]:
        def work():
            size_of = len(text) if size is None else size
            file.write_bytes(struct.pack("<Q", size_of) + text + data)
            opened(copied, tmp_path)

        return work

    texts = {f"the header {shown(text)}": text for text in DOCUMENTS}
    for key in ("dtype", "shape", "data_offsets"):
        values = [*WRONG, [0, 2**63], [8, 4], [-4, 4], [0, 4], [0.5, 1], ["0", "4"], "F32", "F4"]
        for value in values:
            other = header | {tensor: header[tensor] | {key: value}}
            texts[f"{key}={shown(value)}"] = json.dumps(other)
    for value in WRONG:
        texts[f"tensor={shown(value)}"] = json.dumps(header | {tensor: value})
        texts[f"metadata={shown(value)}"] = json.dumps(header | {"__metadata__": value})
    raw = {n: t if isinstance(t, bytes) else t.encode() for n, t in texts.items()}
    forms = {name: form(text) for name, text in raw.items()}
    for size in (0, 1, 7, length - 1, length + 1, len(whole), 2**31, 2**63, 2**64 - 1):
        forms[f"{size} bytes of header"] = form(whole[8 : 8 + length], size)
    for end in (0, 1, 7, 8, 9, 8 + length, len(whole) - 1):
        forms[f"{end} bytes"] = lambda end=end: (
            file.write_bytes(whole[:end]),
            opened(copied, tmp_path),
        )
    check(forms)


META = ["block_count", "context_length", "embedding_length", "feed_forward_length"]
META += ["attention.head_count", "attention.head_count_kv", "attention.key_length"]
META += ["attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.type"]
META += ["rope.scaling.factor", "rope.dimension_count", "attention.sliding_window"]
META = [f"llama.{key}" for key in META] + ["general.file_type", "tokenizer.chat_template"]
META += [f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "merges")]
META += [f"tokenizer.ggml.{key}_token_id" for key in ("bos", "eos", "padding", "unknown")]
META += [f"tokenizer.ggml.add_{key}_token" for key in ("bos", "eos")]
METADATA = [None, 0, 1, 3, 2**31, 0.0, 0.5, 1e38, float("nan"), float("inf"), "", "x", "linear"]
METADATA += ["\x1b[31m", [1], [1, 2], [0.5], ["x"], ["x", "y"], [2**31 - 1], ["t"] * 128]


@pytest.mark.parametrize("key", META)
def test_metadata_of_gguf(tmp_path, monkeypatch, key):
    monkeypatch.setattr(gguffiles, "write_model", tensors_of)

    def work(value):
        write_gguf(tmp_path / "m.gguf", "smollm2_135m", metadata={key: value})
        opened(tmp_path / "m.gguf", tmp_path / "cache")

    check({f"{key}={shown(v)}": lambda v=v: work(v) for v in METADATA})


@cache
def _tensors(config) -> dict:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        return write_model(Path(directory) / "model", config)


def tensors_of(directory: Path, config) -> dict:
    return _tensors(config)


def test_bytes_of_gguf(tmp_path, monkeypatch):
    monkeypatch.setattr(gguffiles, "write_model", tensors_of)
    file = tmp_path / "m.gguf"
    write_gguf(file, "smollm2_135m")
    whole = file.read_bytes()

    def work(content: bytes):
        file.write_bytes(content)
        opened(file, tmp_path / "cache")

    forms = {f"{end} bytes": lambda end=end: work(whole[:end]) for end in range(0, 600, 14)}
    for at in range(0, 600, 6):
        for byte in (b"\xff", b"\x00"):
            content = whole[:at] + byte + whole[at + 1 :]
            forms[f"byte {at} is {byte.hex()}"] = lambda content=content: work(content)
    check(forms)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "dataset_dict.json"])
def test_json_of_a_saved_dataset(tmp_path, name):
    one = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    target = tmp_path / "saved"
    if name == "dataset_dict.json":
        datasets.DatasetDict({"train": one}).save_to_disk(target)
    else:
        one.save_to_disk(target)
    keys = {"state.json": ["_data_files", "_data_files/0", "_data_files/0/filename", "_split"]}
    keys |= {"dataset_dict.json": ["splits"], "dataset_info.json": ["features", "splits"]}
    content = json.loads((target / name).read_text())
    check(files(target / name, content, keys[name], lambda: read(target)))


SETTINGS = ["name", "seed", "model", "model/path", "data", "data/weights", "batch", "batch/pairs"]
SETTINGS += ["optimizer", "optimizer/rule", "optimizer/eps", "beta", "loss", "mesh", "new"]


def test_settings_of_a_run(tmp_path):
    config = configs.DPO()
    file = tmp_path / "config.json"
    forms = files(
        file,
        configs.to_dict(config),
        SETTINGS,
        lambda: resume.check_settings(config, tmp_path, 3),
    )
    check(forms)


def test_json_of_a_run(tmp_path):
    """The baseline's, answers and the lines of metrics."""
    config = dataclasses.replace(configs.DPO(), samples=configs.Samples(prompts=2))
    tokens = in_memory(np.arange(4, dtype=np.int32), np.ones(4, bool), np.array([0, 2, 4]), 2)
    run = SimpleNamespace(config=config, directory=tmp_path, train=tokens, held_out=tokens)
    run.stage = stage_of(config)
    about = {"weights": "w", "tokens": runs._token_keys(run)}
    (tmp_path / "baseline").mkdir()
    (tmp_path / "samples").mkdir()
    forms = files(
        tmp_path / "baseline/about.json",
        about,
        ["weights", "tokens"],
        lambda: runs.stored_baseline(run, {}),
    )
    lines = tmp_path / "metrics.jsonl"
    forms |= files(lines, {"step": 1, "loss": 0.5}, ["step"], lambda: metrics.read(lines))

    def cut(text):
        lines.write_text(text + "\n")
        metrics.cut_back(lines, 3)

    for name, line in changed({"step": 1, "loss": 0.5}, ["step", "loss"]):
        forms[f"a line of metrics: {name}"] = lambda line=line: cut(json.dumps(line))
    file = samples._file(run, 0)
    forms |= files(file, {"prompt": "a"}, ["prompt"], lambda: samples.stored(run, 0))
    check(forms)


@pytest.mark.parametrize("name", ["_METADATA", "_CHECKPOINT_METADATA", "config.json"])
def test_json_of_an_orbax_model(copied, tmp_path, name):
    from alignjax.weights.safetensors import open_directory

    target = write_orbax(open_directory(copied), tmp_path / "orbax", "source")
    (file,) = target.rglob(name)
    content = json.loads(file.read_text())
    forms = files(file, content, list(content), lambda: opened(target, tmp_path))
    check(forms)
