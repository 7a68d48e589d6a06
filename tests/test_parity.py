"""The same weights in transformers and here. Needs torch (the extra `parity`)."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import read_whole, tiny_config, write_model

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")

from presets import PRESETS, tiny  # noqa: E402

from alignjax.config import Compute  # noqa: E402
from alignjax.models.decoder import head_weight, hidden_states  # noqa: E402
from alignjax.models.families import from_hf, to_hf  # noqa: E402
from alignjax.models.rope import RopeScaling  # noqa: E402
from alignjax.sharding import place  # noqa: E402
from alignjax.weights.loading import load  # noqa: E402
from alignjax.weights.safetensors import export, open_directory  # noqa: E402
from alignjax.weights.source import decoder_config  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def ours(model, tokens, positions, segments) -> np.ndarray:
    """Log-probs [B, T, V] by the dense formula over our hidden states."""
    compute = Compute(dtype="float32", remat="none")
    arrays = place((tokens, positions, segments), "batch", None)
    h = np.asarray(hidden_states(model, *arrays, compute))
    logits = h @ np.asarray(head_weight(model))[: model.config.vocab_size].T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def theirs(directory, tokens) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(tokens)).logits, -1).numpy()


FAMILIES = [name for name in PRESETS if not name.startswith(("llama2_1", "llama2_7", "qwen2.5_3"))]
ODD = {
    "tied llama": tiny("llama3_8b", tied_head=True),
    "untied llama": tiny("llama2_7b", vocab_size=131),
    "more heads": tiny("llama3_8b", heads=8, head_dim=4, rope_theta=1e4),
    "wide heads": tiny("llama3_8b", head_dim=12),
    "linear scaling": tiny("llama2_7b", rope_scaling=RopeScaling("linear", 4.0)),
    "window of one": tiny("mistral_7b", window=1),
    "window longer than the row": tiny("mistral_7b", window=100),
    "untied gemma": tiny("gemma_2b", tied_head=False),
    "untied qwen": tiny("qwen3_4b", tied_head=False, vocab_size=130),
}
CASES = {name: tiny(name) for name in FAMILIES} | ODD
LENGTH = 24


def rows(c, rng):
    tokens = rng.integers(0, c.vocab_size, (2, LENGTH)).astype(np.int32)
    return tokens, np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))


@pytest.mark.parametrize("name", CASES)
def test_log_probs_of_a_random_model(tmp_path, name):
    c = CASES[name]
    write_model(tmp_path, c)
    tokens, positions = rows(c, np.random.default_rng(0))
    model = load(open_directory(tmp_path))
    assert model.config == c
    expected = theirs(tmp_path, tokens)
    got = ours(model, tokens, positions, np.ones_like(tokens))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    # Two documents in one row are as each alone, and so are ten, in four blocks of attention.
    for times in (1, 5):
        packed, places = (np.tile(one.reshape(1, -1), times) for one in (tokens, positions))
        segments = np.repeat([1 + np.arange(2 * times)], LENGTH, axis=1).astype(np.int32)
        found = ours(model, packed, places, segments).reshape(times, 2, LENGTH, -1)
        np.testing.assert_allclose(found, np.stack([expected] * times), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama3_8b", {"rope_theta": 1e4}),
        ("llama3.1_8b", {"rope_scaling": None}),
        ("linear scaling", {"rope_scaling": None}),
        ("mistral_7b", {"window": None}),
        ("mistral_7b", {"window": 8}),
        ("gemma_2b", {"scaled_embedding": False}),
        ("gemma_2b", {"unit_offset": False}),
        ("gemma_2b", {"activation": "silu"}),
        ("qwen2.5_0.5b", {"norm_eps": 1e-2}),
    ],
)
def test_what_makes_a_family_is_seen(tmp_path, name, changes):
    """Each constant, if it were ignored, would move the log-probs further than the tests allow."""
    c = CASES[name]
    write_model(tmp_path, c)
    tokens, positions = rows(c, np.random.default_rng(0))
    model = load(open_directory(tmp_path))
    right = ours(model, tokens, positions, np.ones_like(tokens))
    model.config = replace(c, **changes)
    assert np.abs(ours(model, tokens, positions, np.ones_like(tokens)) - right).max() > 1e-4


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_same_config(tmp_path, name, old):
    """Our config.json, and the one that transformers writes from it, in both layouts."""
    from transformers import AutoConfig

    c, file = CASES[name], tmp_path / "config.json"
    file.write_text(json.dumps(to_hf(c)))
    config = AutoConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    written = json.loads(file.read_text())
    if old:
        rope = written.pop("rope_parameters")
        written |= {"rope_theta": rope.pop("rope_theta")}
        written["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    assert from_hf(written, "x") == c


REWARDING = ["llama3.1_8b", "mistral_7b", "gemma_2b", "qwen2.5_0.5b", "qwen3_4b"]


@pytest.mark.parametrize("name", REWARDING)
def test_rewards_of_a_random_model(tmp_path, name):
    """A reward model that we wrote, in transformers; and what transformers writes of it, here."""
    from transformers import AutoModelForSequenceClassification

    c = tiny(name, scored=True)
    written = write_model(tmp_path / "in", c)
    model = load(open_directory(tmp_path / "in"))
    assert model.config == c and model.head is None
    source = open_directory(tmp_path / "in")
    export(model, source, tmp_path / "ours", "source", 10**9)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    )
    assert type(theirs).__name__.endswith("ForSequenceClassification")
    assert theirs.config.num_labels == 1
    theirs.save_pretrained(tmp_path / "theirs")
    again = open_directory(tmp_path / "theirs")
    assert decoder_config(again) == c and set(again.tensors) == set(written)
    assert all(read_whole(again, n).tobytes() == array.tobytes() for n, array in written.items())

    tokens, positions = rows(c, np.random.default_rng(0))
    arrays = place((tokens, positions, np.ones_like(tokens)), "batch", None)
    h = np.asarray(hidden_states(model, *arrays, Compute(dtype="float32", remat="none")))
    theirs.config.pad_token_id = None
    for i in range(len(tokens)):  # transformers gives the reward of the last token
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens[i : i + 1])).logits[0, 0].item()
        got = h[i, -1] @ np.asarray(head_weight(model))[0]
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_an_export_loads_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    written = write_model(tmp_path / "in", tiny_config())
    source = open_directory(tmp_path / "in")
    export(load(source), source, tmp_path / "out", "source", 20_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    state = model.state_dict()
    for name, array in written.items():
        assert state[name].numpy().tobytes() == array.tobytes()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert model.generation_config.eos_token_id == [0, 2]
    chat = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    first, second = (AutoTokenizer.from_pretrained(tmp_path / d) for d in ("in", "out"))
    assert first.apply_chat_template(chat) == second.apply_chat_template(chat)
    assert "<|im_start|>user\nred" in second.apply_chat_template(chat, tokenize=False)
