"""A language model as the reward model that training begins with."""

from dataclasses import replace

import numpy as np

from alignjax.data.chat import end_of_turn_id
from alignjax.models.families import tensor_names, with_score
from alignjax.progress import say
from alignjax.weights.source import Source, Stored, decoder_config


def reward_source(source: Source, tokenizer) -> Source:
    """The source with a score head of zeros in place of the head for words.

    A source that is a reward model already stays as it is. config.json gets a `pad_token_id` that
    ends no answer, since the reward is that of the last token that is not this one.
    """
    config = decoder_config(source)
    if config.scored:
        return source
    (head,), (score,) = tensor_names("head", 0), tensor_names("score", 0)
    zeros = np.zeros((1, config.hidden_size), np.float32)
    tensors = {name: stored for name, stored in source.tensors.items() if name != head}
    tensors[score] = Stored(zeros.shape, zeros.dtype, source.path)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return zeros[index] if name == score else source.read(name, index)

    pad = _pad_id(source, tokenizer, config.vocab_size)
    if pad is None:
        say(
            "The tokenizer can pad with nothing but what ends an answer, so transformers scores "
            "one text at a time with this model; add a padding token for batches."
        )
    hf = with_score(source.config) | {"pad_token_id": pad}
    return replace(source, config=hf, tensors=tensors, read=read)


def _pad_id(source: Source, tokenizer, rows: int) -> int | None:
    """A token that ends no conversation and has one of the embedding's rows.

    The one that pads already, or the unknown one, or else a special one, best a spare.
    """
    special = tokenizer.added_tokens_decoder
    names = {i: token.content.lower() for i, token in special.items() if token.special}
    spare = ("pad", "reserved", "unused", "extra")
    others = sorted(names, key=lambda i: not any(word in names[i] for word in spare))
    pads = (source.config.get("pad_token_id"), tokenizer.pad_token_id, tokenizer.unk_token_id)
    ends = (None, tokenizer.eos_token_id, end_of_turn_id(tokenizer))
    usable = range(min(rows, len(tokenizer)))
    return next((i for i in (*pads, *others) if i in usable and i not in ends), None)
