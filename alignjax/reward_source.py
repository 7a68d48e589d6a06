"""A language model as the reward model that training begins with."""

from dataclasses import replace

import numpy as np

from alignjax.data.chat import end_of_turn_id
from alignjax.models.families import tensor_names, with_score
from alignjax.weights.source import Source, Stored, decoder_config


def reward_source(source: Source, tokenizer) -> Source:
    """The source with a score head of zeros in place of the head for words.

    A source that is a reward model already stays as it is. config.json gets a `pad_token_id` that
    ends no answer, since transformers takes the reward at the last token that is not this one.
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

    ends = (tokenizer.eos_token_id, end_of_turn_id(tokenizer))
    pads = (source.config.get("pad_token_id"), tokenizer.pad_token_id, tokenizer.unk_token_id)
    known = (token for token in pads if token is not None and 0 <= token < len(tokenizer))
    pad = next((token for token in known if token not in ends), None)
    hf = with_score(source.config) | {"pad_token_id": pad}
    return replace(source, config=hf, tensors=tensors, read=read)
