"""Chat templates and tokenizers of three model families, and what they encode."""

import functools

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alignjax.data import chat
from alignjax.data.columns import Side

WHERE = "f.jsonl, line 7"
TEXT = [
    "The sky is blue and the sea is green because the light falls so.",
    "What is the colour of the sky? Tell me about the sea, and tell me why.",
    "def f(x):\n    return x\n\nYes, no; 1, 2, 3. It's déjà vu — für 🐝 and 🐝.\n",
    "user\nassistant\nsystem\nmodel\n",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DROPS_EARLIER_ANSWERS = (
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def backend(special: tuple[str, ...], bos: str = "") -> str:
    """A trained byte-level BPE tokenizer as JSON; one with `bos` puts it before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer.to_str()


def wrapped(special: tuple[str, ...], template: str, bos: str = "", **names):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend(special, bos)),
        clean_up_tokenization_spaces=False,
        **({"bos_token": bos} if bos else {}),
        **names,
    )
    tokenizer.chat_template = template
    return tokenizer


def chatml(pad: str = "<|endoftext|>"):
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return wrapped(special, CHATML, eos_token="<|im_end|>", pad_token=pad)


def llama_2(pad: str = "<unk>"):
    return wrapped(("<unk>", "<s>", "</s>"), LLAMA_2, bos="<s>", eos_token="</s>", pad_token=pad)


def gemma():
    special = ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    return wrapped(special, GEMMA, bos="<bos>", eos_token="<eos>", pad_token="<pad>")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def by_pieces(tokenizer, *pieces: str) -> tuple[list[int], list[bool]]:
    """What is expected: each piece on its own; those that begin with "*" are trained."""
    ids, mask = [], []
    for piece in pieces:
        found = tokenizer.encode(piece.removeprefix("*"), add_special_tokens=False)
        ids += found
        mask += [piece.startswith("*")] * len(found)
    return ids, mask


def encode_side(tokenizer, side: Side, train_on: str = "all") -> tuple[list[int], list[bool]]:
    [found] = chat.encode_sides(tokenizer, [(side, WHERE)], train_on)
    if isinstance(found, ValueError):
        raise found
    ids, mask = found
    assert (ids.dtype, mask.dtype) == (np.int32, bool)
    return ids.tolist(), mask.tolist()


def encode(tokenizer, messages: list[dict], prompt: int = 0, train_on: str = "all"):
    return encode_side(tokenizer, Side(messages[:prompt], messages[prompt:]), train_on)


ASK, TELL = user("What is the colour of the sky?"), assistant("The sky is blue.")
ASK2, TELL2 = user("Why?"), assistant("Yes, déjà vu — the light falls so 🐝.\n\n1, 2, 3")
