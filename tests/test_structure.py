"""What the compiler makes of the training step on eight TPU v5p, with no TPU: read from its dump.

A device receives (n - 1) / n of what n devices gather or reduce.
"""

import importlib.util
import re
from functools import cache

import numpy as np
import pytest
from compiled import transfers
from lowering import CONFIG, compile_attention, program

from alignjax.models.decoder import padded_vocab
from alignjax.models.linear import GRADIENT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the compiler for TPU: pip install alignjax[plan-tpu]",
    ),
]
# With remat=full a weight travels twice: for the forward pass, and for the backward pass, which
# makes the layer's activations again and multiplies by the weight with the same copy.
PASSES = 2
RUNS = [("dpo", 4, 2), ("dpo", 8, 1), ("sft", 4, 2), ("sft", 8, 1), ("rm", 4, 2)]
FLOATS = ("bf16", "f16", "f32", "f64")


def matrices(stage: str) -> int:
    """Parameters of the blocks' matrices and of the head; a reward's is too small to be split."""
    c = CONFIG
    attention = c.hidden_size * c.head_dim * 2 * (c.heads + c.kv_heads)
    blocks = c.layers * (attention + 3 * c.hidden_size * c.mlp_size)
    return blocks + (0 if stage == "rm" else table())


def table() -> int:
    """Parameters of the embedding, or of the head."""
    return padded_vocab(CONFIG.vocab_size) * CONFIG.hidden_size


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(stage, fsdp, tensor, dtype) -> the program, compiled once."""
    directory = tmp_path_factory.mktemp("dumps")
    return cache(lambda *run: program(*run, directory / "-".join(map(str, run))))


def check_weights(text: str, stage: str, fsdp: int, tensor: int) -> None:
    """Weights travel in bfloat16, as often as they must and not more.

    Whatever is gathered or passed on counts as a weight unless its name says it is a gradient.
    """
    weights = [
        one
        for one in transfers(text)
        if one.kind in ("all-gather", "collective-permute")
        and GRADIENT not in one.source
        and one.dtype in FLOATS
    ]
    assert {one.dtype for one in weights} == {"bf16"}, "weights travel in another type"
    expected = PASSES * 2 * matrices(stage) / tensor * (fsdp - 1) / fsdp
    assert sum(one.received for one in weights) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("stage, fsdp, tensor", RUNS)
def test_weights_travel_in_bfloat16_twice(compiled, stage, fsdp, tensor):
    check_weights(compiled(stage, fsdp, tensor, "bfloat16"), stage, fsdp, tensor)


def test_float32_weights_are_found_out(compiled):
    with pytest.raises(AssertionError, match="weights travel in another type"):
        check_weights(compiled("dpo", 8, 1, "float32"), "dpo", 8, 1)


@pytest.mark.parametrize("stage, fsdp, tensor", RUNS)
def test_gradients_are_scattered_and_none_is_reduced_whole(compiled, stage, fsdp, tensor):
    """Over fsdp, all-reduces are left to norms and metrics; neither table travels in one piece."""
    found = transfers(compiled(stage, fsdp, tensor, "bfloat16"))
    whole = [one for one in found if one.kind == "all-reduce" and one.group == fsdp]
    assert sum(one.received for one in whole) < 1e6
    assert max(int(np.prod(one.shape)) for one in found) < table() / tensor
    gradients = [one for one in found if GRADIENT in one.source]
    assert {one.dtype for one in gradients} == {"f32"}
    expected = 4 * matrices(stage) / tensor * (fsdp - 1) / fsdp
    # A ring of eight that reduces while it multiplies passes parts on nine times, not seven.
    assert 0.9 < sum(one.received for one in gradients) / expected < 1.35


@pytest.mark.parametrize("stage, fsdp, tensor", RUNS)
def test_the_embedding_travels_as_the_tokens_rows(compiled, stage, fsdp, tensor):
    """Forward and backward, each in bfloat16: the hidden states of a device's tokens."""
    found = transfers(compiled(stage, fsdp, tensor, "bfloat16"))
    rows = [one for one in found if one.kind == "all-to-all" and one.dtype in FLOATS]
    assert {one.dtype for one in rows} == {"bf16"}
    each = 2 * 2048 * CONFIG.hidden_size * (fsdp - 1) / fsdp
    assert sum(one.received for one in rows) == pytest.approx(2 * each, rel=0.1)


@pytest.mark.parametrize("stage, fsdp, tensor", RUNS)
def test_a_device_keeps_its_part_of_weights_and_moments(compiled, stage, fsdp, tensor):
    text = compiled(stage, fsdp, tensor, "bfloat16")
    results = text.partition("\n")[0].partition("->")[2]
    shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"\bf32\[([\d,]+)\]", results)]
    held = {shape: shapes.count(shape) for shape in shapes}
    assert all(count % 3 == 0 for count in held.values()), held  # weights and both moments
    parameters = sum(int(np.prod(shape)) for shape in shapes) / 3
    assert parameters == pytest.approx((matrices(stage) + table()) / 8, rel=0.01)


@pytest.mark.parametrize("stage, fsdp, tensor", RUNS)
def test_attention_is_the_splash_kernel(compiled, stage, fsdp, tensor):
    text = compiled(stage, fsdp, tensor, "bfloat16")
    for part in ("fwd", "dq", "dkv"):
        assert re.search(rf"%splash_mha_{part}_segmented\S* = .* custom-call\(", text), part


@pytest.mark.parametrize("size, window, length", [(64, 0, 2048), (80, 100, 1024), (256, 0, 200)])
def test_splash_compiles_for_every_head_size(size, window, length):
    compile_attention(size, window, length)
