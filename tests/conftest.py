"""Eight fake devices for every test; random tiny Llama models in Hugging Face's form."""

import os
import tempfile

# Most of a test's time is the compiler's: it does less, and what it made is kept for all runs.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "alignjax-tests-compiled")
)
os.environ.setdefault("JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or libtpu, where it is installed, looks for a TPU

import json
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from presets import tiny

from alignjax import sharding
from alignjax.models.families import to_hf
from alignjax.models.shapes import DecoderConfig
from alignjax.weights.source import Source

pytest.register_assert_rewrite("oracle", "refusals", "running")
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def mesh(replica: int = 1, fsdp: int = 1, tensor: int = 1) -> None:
    """Sets a mesh over the first devices only, so that one process can compare several."""
    count = replica * fsdp * tensor
    jax.set_mesh(
        jax.make_mesh((replica, fsdp, tensor), sharding.AXES, devices=jax.devices()[:count])
    )


@pytest.fixture(autouse=True)
def one_device():
    mesh()


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """A process that runs all tests would have more maps of programs than Linux gives it."""
    yield
    jax.clear_caches()


def tiny_config(tied: bool = True, **changes) -> DecoderConfig:
    return tiny("llama3_8b", tied_head=tied, **changes)


def hf_config(c: DecoderConfig) -> dict:
    return to_hf(c) | {
        "attention_bias": False,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def write_tokenizer(directory: Path, vocab_size: int = 128) -> None:
    """A byte-level tokenizer with ChatML's special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ascii_only = sorted(c for c in pre_tokenizers.ByteLevel.alphabet() if ord(c) < 127)
    vocab = {token: i for i, token in enumerate([*special, "Ġ", "Ċ", *ascii_only])}
    assert len(vocab) <= vocab_size
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
        "'<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    fast.save_pretrained(directory)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)  # a token for each letter
    return directory


@pytest.fixture
def tokenizer(tokenizer_dir):
    from alignjax.data import chat

    return chat.load_tokenizer(tokenizer_dir)


def write_model(
    directory: Path, c: DecoderConfig, seed: int = 0, dtype="float32", files: int = 1
) -> dict[str, np.ndarray]:
    """A Hugging Face directory of random weights; returns its tensors."""
    from safetensors.numpy import save_file

    from alignjax.models.families import TENSORS, tensor_names
    from alignjax.models.shapes import is_stacked, leaf_shapes

    rng = np.random.default_rng(seed)
    shapes, tensors = leaf_shapes(c), {}
    for leaf in (leaf for leaf in TENSORS if leaf in shapes):
        shape = shapes[leaf][1:] if is_stacked(leaf) else shapes[leaf]
        middle = float(leaf.endswith("norm") and not c.unit_offset)
        for name in tensor_names(leaf, c.layers):
            array = middle + 0.1 * rng.standard_normal(shape)
            tensors[name] = array.astype(np.float32).astype(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(c)))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    write_tokenizer(directory, c.vocab_size)
    names = list(tensors)
    if files == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return tensors
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = names[i::files]
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def written(tmp_path) -> Path:
    """An Orbax model directory of bfloat16, beside the Hugging Face directory it came from."""
    from alignjax.weights import orbax_write
    from alignjax.weights.safetensors import open_directory

    write_model(tmp_path / "hf", tiny_config(), dtype=BF16, files=2)
    return orbax_write.write_model(open_directory(tmp_path / "hf"), tmp_path / "model", "source")


def read_whole(source: Source, name: str) -> np.ndarray:
    return source.read(name, (slice(None),) * len(source.tensors[name].shape))


def bytes_of(tensors: dict[str, np.ndarray]) -> dict[str, tuple]:
    return {name: (t.dtype, t.shape, t.tobytes()) for name, t in tensors.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A directory with a model and pairs that a run accepts, for a module of refusals."""
    from refusals import prepare

    return prepare(tmp_path_factory.mktemp("root"))


@pytest.fixture
def refusal(monkeypatch, capsys, root, tmp_path):
    """Runs with the settings given; gives the sentence that refuses them."""
    from refusals import refused

    return partial(refused, monkeypatch, capsys, root, tmp_path / "run")


def write_pairs(file: Path, count: int, held_out: int = 0, seed: int = 0) -> None:
    """Preference rows of random words, of uneven lengths."""
    rng = np.random.default_rng(seed)
    words = "red green blue one two three four five sun moon sea sky".split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words, rng.integers(low, high)))

    with file.open("w") as out:
        for i in range(count + held_out):
            row = {
                "prompt": f"{i} {text(1, 4)}",
                "chosen": text(1, 6),
                "rejected": text(1, 6) + " no",
                "split": "train" if i < count else "test",
            }
            out.write(json.dumps(row) + "\n")


def random_batch(c: DecoderConfig, rng, rows: int, length: int, lengths: list[list[int]], sides=2):
    """Packed rows of random tokens: `lengths` gives the sequences of each row; no padding rule is
    assumed but the one `PackedBatch` states."""
    from alignjax.data.batches import PackedBatch

    places = max(len(row) // sides for row in lengths)
    tokens, positions, segments = (np.zeros((rows, length), np.int32) for _ in range(3))
    items = np.zeros((rows, places), np.int32)
    ref = np.zeros((rows, places, sides), np.float32)
    targets = np.zeros((rows, length), np.int32)
    number = 0
    for r, row in enumerate(lengths):
        at, trained = 0, []
        for s, n in enumerate(row):
            tokens[r, at : at + n] = rng.integers(3, c.vocab_size, n)
            positions[r, at : at + n] = np.arange(n)
            segments[r, at : at + n] = s + 1
            trained += [at + i for i in range(1, n) if i >= n // 2]
            at += n
        targets[r, : len(trained)] = trained
        for p in range(len(row) // sides):
            number += 1
            items[r, p] = number
            ref[r, p] = rng.standard_normal(sides)
    return PackedBatch(
        tokens,
        positions,
        segments,
        targets,
        items,
        ref,
        margin=np.zeros((rows, places), np.float32),
        weight=(items > 0).astype(np.float32),
        rank=np.where(items[..., None] > 0, np.arange(1, sides + 1), 0).astype(np.int32),
    )
