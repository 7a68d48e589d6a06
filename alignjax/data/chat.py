"""Conversations -> token ids and the mask of trained tokens.

Which tokens are trained follows from spans of the rendered text, never from token ids: the text of
a conversation is rendered up to a turn's header and through its end; tokens inside are its own.
"""

from pathlib import Path

from alignjax.data.rows import Side

_MARK = "\x02the answer\x03"  # stands for an answer while the text around it is found


def load_tokenizer(directory: Path, chat_template: str = ""):
    """A model directory's fast tokenizer; `chat_template` names a file that replaces its own."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{directory}: its tokenizer does not load ({first}).") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{directory}: there is no tokenizer.json; a fast tokenizer is needed.")
    if chat_template:
        if not Path(chat_template).is_file():
            raise ValueError(f"model.chat_template={chat_template}: there is no such file.")
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


def render(tokenizer, messages: list[dict], generate: bool = False) -> str:
    """A conversation as the text the model sees; `generate` adds the next answer's header."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)


def encode_side(tokenizer, side: Side, train_on: str, where: str) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it is trained.

    Trained are the assistant turns of the answer (`train_on` "all", or only the "last"), each from
    behind its header through its end-of-turn token. Plain text is trained from the prompt's end
    through an EOS token.
    """
    if isinstance(side.answer, str):
        return _encode_plain(tokenizer, side, where)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: the model has no chat template; name one with --model.chat_template=FILE, "
            "or set data.strings=plain for plain text."
        )
    messages = [*side.prompt, *side.answer]
    turns = [
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and i >= len(side.prompt)
    ]
    text, spans = _spans(tokenizer, messages, turns[-1:] if train_on == "last" else turns, where)
    encoded = _encode(tokenizer, text, False, where)
    mask = [
        any(start <= first and last <= end for start, end in spans)
        for first, last in encoded.offsets
    ]
    return encoded.ids, mask


def _spans(tokenizer, messages, turns: list[int], where: str) -> tuple[str, list[tuple[int, int]]]:
    """Text of the conversation and where its trained turns begin and end, in characters."""
    from jinja2 import TemplateError

    try:
        text = render(tokenizer, messages)
        spans = []
        for i in turns:
            header = render(tokenizer, messages[:i], generate=True)
            through = render(tokenizer, messages[: i + 1])
            marked = render(tokenizer, [*messages[:i], {**messages[i], "content": _MARK}])
            tail = marked.partition(_MARK)[2]
            if not (text.startswith(through) and through.startswith(header)):
                raise ValueError(
                    f"{where}: the chat template renders turn {i + 1} otherwise when turns follow "
                    "it, so its tokens cannot be told apart; set data.train_on=last, or name "
                    "another --model.chat_template."
                )
            spans.append((len(header), len(through) - len(tail) + _end_of_turn(tokenizer, tail)))
        return text, spans
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses this row ({error}).") from None


def _end_of_turn(tokenizer, tail: str) -> int:
    """Characters behind an answer that end its turn: through the first special token."""
    ends = [
        tail.index(token) + len(token)
        for token in tokenizer.all_special_tokens + list(tokenizer.get_added_vocab())
        if token in tail
    ]
    return min(ends, default=0)


def _encode_plain(tokenizer, side: Side, where: str) -> tuple[list[int], list[bool]]:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{where}: the tokenizer has no EOS token, which ends plain text.")
    encoded = _encode(tokenizer, side.prompt + side.answer, True, where)
    ids = list(encoded.ids)
    # A token that holds the prompt's last space and the answer's first word is the answer's.
    mask = [
        not special and last > len(side.prompt)
        for special, (_, last) in zip(encoded.special_tokens_mask, encoded.offsets, strict=True)
    ]
    if ids[-1] == tokenizer.eos_token_id:
        mask[-1] = True
        return ids, mask
    return [*ids, tokenizer.eos_token_id], [*mask, True]


def _encode(tokenizer, text: str, add_special_tokens: bool, where: str):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: the text is not valid Unicode (half a surrogate pair at character "
            f"{error.start}); remove the character."
        ) from None
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
