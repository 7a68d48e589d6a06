"""GGUF files of every family, quantization and kind of tokenizer that is read."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import read_whole
from gguffiles import write_gguf
from presets import tiny
from realtokenizers import MAKERS, package

from alignjax.models.rope import RopeScaling
from alignjax.weights import gguf
from alignjax.weights.compare import compare
from alignjax.weights.gguf_tokenizer import SPLITS, build_tokenizer
from alignjax.weights.source import check_tensors, decoder_config

PRESETS = ["llama2_7b", "llama3.1_8b", "qwen2.5_0.5b", "qwen3_4b", "gemma_2b"]
TEXTS = [
    "Count: 1, 22, 333, 4444 and 12.5%!",
    "Quelle heure est-il à Zürich? 東京 🐝",
    "  two  spaces\t tabs\n\n\nlines \r\n",
    "it's I'M they'll WE'VE CamelCase",
    "def add(a, b):\n    return a +",
    " ",
]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_file_gives_the_config_and_tensors_it_was_made_of(tmp_path, preset):
    scaling = RopeScaling("llama3", 8.0) if "3.1" in preset else None
    tied = preset != "llama2_7b"
    made = write_gguf(
        tmp_path / "m.gguf", preset, head_dim=32, rope_scaling=scaling, tied_head=tied
    )
    c, tensors = made
    source = gguf.open_gguf(tmp_path / "m.gguf", tmp_path / "cache")
    check_tensors(source)
    assert decoder_config(source) == c
    assert set(source.tensors) == set(tensors)
    for name, array in tensors.items():
        got = read_whole(source, name)
        if c.unit_offset and name.endswith("norm.weight"):  # 1 + w is what is stored
            np.testing.assert_array_equal(got, (array + 1) - 1)
        else:
            np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize(
    ("kind", "worst"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 0.02), ("Q4_0", 0.2), ("Q4_1", 0.2)]
)
def test_a_quantized_file_is_about_what_it_was_made_of(tmp_path, kind, worst):
    _, tensors = write_gguf(tmp_path / "m.gguf", quantized=kind)
    source = gguf.open_gguf(tmp_path / "m.gguf", tmp_path / "cache")
    for name, array in tensors.items():
        wrong = np.abs(read_whole(source, name) - array).max() / np.abs(array).max()
        assert (0 < wrong < worst) if array.ndim == 2 else not wrong, name


def test_linear_rope_scaling(tmp_path):
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "m.gguf", metadata=metadata)
    source = gguf.open_gguf(tmp_path / "m.gguf", tmp_path / "cache")
    assert decoder_config(source).rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("preset", ["llama2_7b", "qwen2.5_0.5b", "qwen3_4b"])
def test_logits_equal_those_of_transformers_reading_it(tmp_path, preset):
    pytest.importorskip("torch", reason="the extra `parity` is not installed")
    # transformers does not read the head size: it takes Qwen3's to be 128.
    head_dim = 128 if preset.startswith("qwen3") else 32 // tiny(preset).heads
    file = tmp_path / "m.gguf"
    write_gguf(file, preset, head_dim=head_dim, quantized="Q8_0")
    source = gguf.open_gguf(file, tmp_path / "cache")
    assert compare(source, source).kl < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_equal_what_transformers_makes_of_them(tmp_path, kind):
    torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from transformers.integrations.gguf.dequant import dequantize

    size, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (64, 2 * width), np.uint8)
    halves = blocks.reshape(-1, width).view(np.float16)
    halves[~np.isfinite(halves)] = 1  # wherever a kind keeps its scales
    flat = dequantize(torch.tensor(blocks).reshape(-1), int(GGMLQuantizationType[kind]))
    expected = flat.numpy().reshape(64, 2 * size)
    change = {"blk.1.ffn_gate.weight": (blocks, kind)}
    write_gguf(tmp_path / "m.gguf", change=change, hidden_size=2 * size)
    source = gguf.open_gguf(tmp_path / "m.gguf", tmp_path / "cache")
    got = source.read("model.layers.1.mlp.gate_proj.weight", (slice(3, 60), slice(5, None)))
    np.testing.assert_array_equal(got, expected[3:60, 5:])


def metadata_of(arch: str, kind: str, tokens: list[str], types: list[int], **more) -> dict:
    keys = {"model": kind, "tokens": tokens, "token_type": types, **more}
    return {"general.architecture": arch} | {f"tokenizer.ggml.{k}": v for k, v in keys.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
def test_sentencepiece_from_its_scores(name):
    package("sentencepiece")
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(str(package("mistral_common") / "data" / name))
    ids = range(theirs.vocab_size())
    kinds = [(3, theirs.is_control), (2, theirs.is_unknown), (6, theirs.is_byte)]
    metadata = metadata_of(
        "llama",
        "llama",
        [theirs.id_to_piece(i) for i in ids],
        [next((kind for kind, is_it in kinds if is_it(i)), 1) for i in ids],
        scores=[theirs.get_score(i) for i in ids],
        unknown_token_id=theirs.unk_id(),
    )
    ours = build_tokenizer(metadata, Path("m.gguf"))
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == text


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "pre"), [("llama3", "llama-bpe"), ("tekken-v3", "tekken")])
def test_byte_level_tokenizers_from_their_names(tmp_path, name, pre):
    from transformers import AutoTokenizer

    MAKERS[name](tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    stored = json.loads(theirs.backend_tokenizer.to_str())
    added = {token["id"] for token in stored["added_tokens"]}
    vocab = sorted(theirs.get_vocab().items(), key=lambda item: item[1])
    metadata = metadata_of(
        "llama",
        "gpt2",
        [token for token, _ in vocab],
        [3 if i in added else 1 for _, i in vocab],
        pre=pre,
        merges=[" ".join(merge) for merge in stored["model"]["merges"]],
    )
    ours = build_tokenizer(metadata, Path("m.gguf"))
    for text in [*TEXTS, f"{vocab[min(added)][0]}hi"]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == text


def test_qwens_split_is_that_of_transformers():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert SPLITS["qwen2"] == PRETOKENIZE_REGEX


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_gemmas_tokenizer(tmp_path):
    """Gemma 3's, which a package has; Gemma 1's is of the same kind."""
    pytest.importorskip("torch", reason="the extra `parity` is not installed")
    from transformers import AutoTokenizer
    from transformers.integrations.gguf import get_gguf_tokenizer

    MAKERS["gemma3"](tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    _, stored, _ = get_gguf_tokenizer(str(tmp_path / "gguf" / "model.gguf"))
    metadata = metadata_of(
        "gemma",
        "llama",
        stored["tokens"],
        list(stored["token_type"]),
        scores=list(stored["scores"]),
        unknown_token_id=stored["unk_token_id"],
        add_space_prefix=stored["add_prefix_space"],
    )
    ours = build_tokenizer(metadata, Path("m.gguf"))
    for text in [*TEXTS, "<start_of_turn>user\nhi<end_of_turn>"]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("arch", "kind", "pre", "what"),
    [
        ("llama", "gpt2", "poro", "tokenizer 'gpt2' with pre-tokenizer 'poro'"),
        ("llama", "gpt2", None, "tokenizer 'gpt2' with pre-tokenizer None"),
        ("qwen2", "llama", None, "tokenizer 'llama' of a qwen2 model"),
        ("gemma", "t5", None, "tokenizer 't5' of a gemma model"),
    ],
)
def test_tokenizers_that_are_not_known(arch, kind, pre, what):
    with pytest.raises(ValueError) as error:
        build_tokenizer(metadata_of(arch, kind, ["a"], [1], pre=pre), Path("m.gguf"))
    assert str(error.value) == (
        f"m.gguf: {what} is not supported in a GGUF file; give the Hugging Face directory of the "
        "model as model.path instead."
    )
