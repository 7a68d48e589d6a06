"""The same weights in transformers and here. Needs torch (the extra `parity`)."""

import numpy as np
import pytest
from conftest import tiny_config, write_model

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")

from alignjax.config import Compute  # noqa: E402
from alignjax.models.decoder import head_weight, hidden_states  # noqa: E402
from alignjax.sharding import place  # noqa: E402
from alignjax.weights.safetensors import export, open_directory  # noqa: E402
from alignjax.weights.source import load  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def ours(model, tokens, positions, segments) -> np.ndarray:
    """Log-probs [B, T, V] by the dense formula over our hidden states."""
    compute = Compute(dtype="float32", remat="none")
    arrays = place((tokens, positions, segments), "batch", None)
    h = np.asarray(hidden_states(model, *arrays, compute))
    logits = h @ np.asarray(head_weight(model)).T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def theirs(directory, tokens) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(tokens)).logits, -1).numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {"tied": True},
        {"tied": False},
        {"heads": 8, "head_dim": 4, "rope_theta": 1e4},
        {"head_dim": 12},
    ],
)
def test_log_probs_of_a_random_llama(tmp_path, changes):
    c = tiny_config(**changes)
    write_model(tmp_path, c)
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, (2, 24)).astype(np.int32)
    positions = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    model = load(open_directory(tmp_path))
    expected = theirs(tmp_path, tokens)
    got = ours(model, tokens, positions, np.ones_like(tokens))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    # Two documents in one row are as each alone.
    packed = np.concatenate([tokens[:1], tokens[1:]], axis=1)
    segments = np.repeat([[1, 2]], 24, axis=1).reshape(1, 2, 24).transpose(0, 2, 1)
    segments = np.sort(segments.reshape(1, 48), axis=1).astype(np.int32)
    both = ours(model, packed, positions.reshape(1, 48), segments)
    np.testing.assert_allclose(both.reshape(2, 24, -1), expected, atol=1e-5)


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
