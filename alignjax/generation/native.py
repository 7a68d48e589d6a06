"""A plain batched sampler with a key/value cache.

B prompts, T tokens of the longest prompt, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.config import Compute
from alignjax.models.decoder import Decoder, empty_cache, extend, head_weight
from alignjax.models.linear import gather
from alignjax.sharding import axis_size, place, spec, to_host


def generate(
    model: Decoder,
    prompts: list[list[int]],
    eos_ids: list[int],
    max_tokens: int,
    temperature: float,
    seed: int,
    batch: int,
    compute: Compute,
    progress: Callable[[int], None] = lambda done: None,
    keep_end: bool = False,
) -> list[list[int]]:
    """Answers to prompts of token ids, without the end token that closed one, or with `keep_end`.

    `batch` prompts are answered at a time on each data-parallel device; `temperature` 0 is greedy.
    `progress` is told how many prompts are done.
    """
    devices = axis_size("batch")
    size = devices * min(batch, -(-len(prompts) // devices))
    length = -(-max(map(len, prompts)) // 16) * 16
    answers: list[list[int]] = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        tokens = np.zeros((size, length), np.int32)
        real = np.zeros((size, length), np.int32)
        for i, prompt in enumerate(part):
            tokens[i, length - len(prompt) :] = prompt
            real[i, length - len(prompt) :] = 1
        out = _decode(
            model,
            *place((tokens, real), "batch", None),
            jax.random.fold_in(jax.random.key(seed), start),
            eos_ids=tuple(eos_ids),
            max_tokens=max_tokens,
            temperature=temperature,
            compute=compute,
        )
        for ids in to_host(out)[: len(part)].tolist():
            ends = [i for i, token in enumerate(ids) if token in eos_ids]
            answers.append(ids[: ends[0] + keep_end] if ends else ids)
        progress(len(answers))
    return answers


@partial(jax.jit, static_argnames=("eos_ids", "max_tokens", "temperature", "compute"))
def _decode(
    model: Decoder,
    tokens_BT,
    real_BT,
    key,
    *,
    eos_ids: tuple[int, ...],
    max_tokens: int,
    temperature: float,
    compute: Compute,
):
    """Generated tokens [B, max_tokens]; after an end token a row repeats it."""
    size, length = tokens_BT.shape
    head_VD = gather(head_weight(model), compute.dtype)
    rows = spec("batch", None)

    def pick(h_BD, i):
        logits_BV = jnp.einsum(
            "bd,vd->bv",
            h_BD,
            head_VD,
            preferred_element_type=jnp.float32,
            out_sharding=spec("batch", "vocab"),
        )
        logits_BV = jax.reshard(logits_BV, rows)[:, : model.config.vocab_size]
        if temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        noise_BV = jax.random.gumbel(jax.random.fold_in(key, i), logits_BV.shape, out_sharding=rows)
        return jnp.argmax(logits_BV / temperature + noise_BV, axis=-1).astype(jnp.int32)

    def is_end(token_B):
        return (token_B[:, None] == jnp.asarray(eos_ids, jnp.int32)).any(-1)

    positions_BT = jnp.maximum(jnp.cumsum(jax.reshard(real_BT, rows), axis=1) - 1, 0)
    cache = empty_cache(model.config, size, length + max_tokens, compute.dtype)
    h_BTD, cache = extend(model, tokens_BT, positions_BT, real_BT, cache, 0, compute)
    token_B = pick(h_BTD[:, -1], 0)
    out_BN = jnp.zeros((size, max_tokens), jnp.int32, out_sharding=rows).at[:, 0].set(token_B)
    next_B = positions_BT[:, -1] + 1

    def unfinished(carry):
        i, token_B, *_ = carry
        return (i < max_tokens) & ~is_end(token_B).all()

    def advance(carry):
        i, token_B, out_BN, cache = carry
        h_BTD, cache = extend(
            model,
            token_B[:, None],
            (next_B + i - 1)[:, None],
            jnp.ones_like(token_B)[:, None],
            cache,
            length + i - 1,
            compute,
        )
        token_B = jnp.where(is_end(token_B), token_B, pick(h_BTD[:, -1], i))
        return i + 1, token_B, out_BN.at[:, i].set(token_B), cache

    i, token_B, out_BN, _ = jax.lax.while_loop(
        unfinished, advance, (jnp.int32(1), token_B, out_BN, cache)
    )
    rest = jnp.arange(max_tokens) >= i
    return jnp.where(rest, token_B[:, None], out_BN)
