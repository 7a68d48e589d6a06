"""Conversations -> token ids and the mask of trained tokens, many conversations at a time.

Which tokens are trained follows from spans of the rendered text, never from token ids: the text of
a conversation is rendered up to a turn's header and through its end; tokens inside are its own.
"""

import importlib.util
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from datetime import datetime
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from alignjax import templates
from alignjax.data.columns import Side
from alignjax.data.foreign import MEMORY, SECONDS, bounded, is_error, quiet
from alignjax.data.formats import first_line
from alignjax.errors import UserError
from alignjax.validate import check

_LONGEST = 1 << 23  # characters encoded together, and those of one text; some take 250 bytes each
_DATE = re.compile(r"strftime_now(?: is defined|\((['\"])([^'\"\\]*)\1\))")
_MARK = "\x02the answer\x03"  # stands for an answer while the text around it is found

Encoded = tuple[np.ndarray, np.ndarray]  # int32 ids; bool, whether each is trained


class _Refused(UserError):
    """What is wrong with one row under a chat template."""


def load_tokenizer(directory: Path, chat_template: str = "", started: datetime | None = None):
    """Load a directory's fast tokenizer, with a chat template by name or file in place of its own.

    A template that writes today's date writes that of `started` (None: now). Raises UserError
    where there is no such tokenizer, or `templates.choose` refuses the template.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                directory,
                trust_remote_code=False,
                mistral_format=False,  # else a tekken.json is read by mistral-common, if installed
            )
            special_ids(tokenizer)  # names that are not strings fail here
            np.array([*tokenizer.get_vocab().values()], np.int32)  # and ids that no array holds
    except BaseException as error:
        if not is_error(error):
            raise
        pieces = directory / "tokenizer.model"
        reason = first_line(error)
        if pieces.is_file() and not importlib.util.find_spec("sentencepiece"):
            reason = "its tokenizer.model is read with sentencepiece: pip install sentencepiece"
        raise UserError(
            f"{directory}: its tokenizer does not load ({reason}); copy or fetch its files again, "
            "or update transformers and tokenizers."
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: there is no tokenizer.json; a fast tokenizer is needed.")
    tokenizer.started = started or datetime.now()
    if chat_template:
        tokenizer.chat_template = templates.choose(tokenizer, chat_template)
    elif isinstance(tokenizer.chat_template, dict):
        several = f"the model has several, and none is the default: {[*tokenizer.chat_template]}"
        refusing = f"{{{{ raise_exception({several!r}) }}}}"
        tokenizer.chat_template = tokenizer.chat_template.get("default", refusing)
    check(tokenizer.chat_template, str | None, str(directory), "chat_template")
    # Both can stand in tokenizer.json; what is too long, and where padding goes, is decided here.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def dates_of(tokenizer) -> list[str]:
    """Return what the chat template can write of the time at which the tokenizer was loaded."""
    template = tokenizer.chat_template or ""
    formats = [match[2] or "" for match in _DATE.finditer(template)]
    if len(formats) < template.count("strftime_now"):  # some are made as it renders
        return [tokenizer.started.isoformat()]
    return [tokenizer.started.strftime(form) for form in formats]


def render(
    tokenizer,
    messages: list[dict],
    generate: bool = False,
    where: str = "a conversation",
    variables: dict | None = None,
) -> str:
    """Return a conversation as the text the model sees, with the next answer's header (`generate`).

    `variables` are more of the template's. Raises UserError with `where` if the template refuses.
    """
    from transformers.utils import chat_template_utils

    template = tokenizer.chat_template
    try:
        with bounded():
            if started := vars(tokenizer).get("started"):
                compiled = chat_template_utils._compile_jinja_template(template)  # kept there
                compiled.globals["strftime_now"] = started.strftime
            return tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generate,
                **variables or {},
            )
    except (TimeoutError, MemoryError):
        raise UserError(
            f"{where}: the chat template takes more than {SECONDS} seconds or {MEMORY >> 30} GiB "
            "to render it; name another --model.chat_template."
        ) from None
    except Exception as error:
        raise _Refused(
            f"{where}: the chat template refuses this row ({first_line(error)}); change the row, "
            "or name another --model.chat_template."
        ) from None


def end_of_turn_id(tokenizer) -> int | None:
    """Return the token that ends an answer under the chat template.

    None where there is no such token, or the template refuses every conversation tried.
    """
    system, ask = ({"role": role, "content": "?"} for role in ("system", "user"))
    for before in ([ask], [system, ask]) if tokenizer.chat_template else ():
        try:
            text = render(tokenizer, [*before, {"role": "assistant", "content": _MARK}])
        except _Refused:
            continue
        tail = text.partition(_MARK)[2]
        [end] = _encodings(tokenizer, [(tail[: _end_of_turn(tokenizer, tail)], "")], False)
        return None if isinstance(end, UserError) or not end.ids else end.ids[-1]
    return None


def encode_sides(
    tokenizer, sides: list[tuple[Side, str]], train_on: str
) -> list[Encoded | UserError]:
    """Token ids of conversations and which are trained; a ValueError in the place of a bad one.

    Each side comes with its row's place. Trained are the assistant turns of the answer (`train_on`
    "all", or only the "last"), each from behind its header through its end-of-turn token. Plain
    text is trained from the prompt's end through an EOS token. With `train_on` "everything" all
    tokens are. Raises UserError itself where the tokenizer lacks what every side needs.
    """
    found: dict[int, Encoded | UserError] = {}
    plain = [i for i, (side, _) in enumerate(sides) if isinstance(side.answer, str)]
    chats = [i for i, (side, _) in enumerate(sides) if not isinstance(side.answer, str)]
    if plain:
        found |= zip(plain, _encode_plain(tokenizer, [sides[i] for i in plain]), strict=True)
    if chats:
        encoded = _encode_chats(tokenizer, [sides[i] for i in chats], train_on)
        found |= zip(chats, encoded, strict=True)
    if train_on == "everything":
        for i, side in found.items():
            if sides[i][0].kept_out:
                found[i] = UserError(
                    f"{sides[i][1]}: `weight` or `train` of its messages keeps an answer out of "
                    "training, and data.train_on=everything trains all; set data.train_on=all."
                )
            elif not isinstance(side, UserError):
                side[1][:] = True
    return [found[i] for i in range(len(sides))]


def _encode(
    tokenizer,
    texts: list[str | UserError],
    wheres: list[str],
    special: bool,
    mask: Callable[[int, tokenizers.Encoding], Encoded],
) -> list[Encoded | UserError]:
    """Encode texts; `special` adds the tokenizer's own BOS or EOS, `mask` finds what is trained.

    They are encoded together, on all cores, as far as memory allows.
    """
    found = [
        text if isinstance(text, UserError) else _unfit(text, where)
        for text, where in zip(texts, wheres, strict=True)
    ]
    good = [i for i, error in enumerate(found) if error is None]
    while good:
        sizes = accumulate(len(texts[i]) for i in good)
        count = max(sum(size <= _LONGEST for size in sizes), 1)
        part, good = good[:count], good[count:]
        encodings = _encodings(tokenizer, [(texts[i], wheres[i]) for i in part], special)
        for i, encoding in zip(part, encodings, strict=True):
            found[i] = encoding if isinstance(encoding, UserError) else mask(i, encoding)
    return found


def _encodings(
    tokenizer, texts: list[tuple[str, str]], special: bool
) -> list[tokenizers.Encoding | UserError]:
    """Encode texts, each with its place, together; an error in the place of one that fails."""
    try:
        with quiet():
            return tokenizer.backend_tokenizer.encode_batch(
                [text for text, _ in texts], add_special_tokens=special
            )
    except BaseException as error:
        if not is_error(error):
            raise
        if len(texts) == 1:
            said = f"{texts[0][1]}: the tokenizer fails on its text ({first_line(error)})"
            return [UserError(f"{said}; change the row, or mend the model's tokenizer.json.")]
    return [one for text in texts for one in _encodings(tokenizer, [text], special)]


def _unfit(text: str, where: str) -> UserError | None:
    """What makes a text unfit for a tokenizer."""
    if len(text) > _LONGEST:
        said = f"{where}: the text has {len(text):,} characters, and {_LONGEST:,} are the most"
        return UserError(f"{said}; divide the row, or remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return UserError(
            f"{where}: the text is not valid Unicode (half a surrogate pair at character "
            f"{error.start}); remove the character."
        )
    return None


# Plain text


def _encode_plain(tokenizer, sides: list[tuple[Side, str]]) -> list[Encoded | UserError]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError(f"{sides[0][1]}: the tokenizer has no EOS token, which ends plain text.")
    texts = [side.prompt + side.answer for side, _ in sides]

    def mask(i: int, encoding: tokenizers.Encoding) -> Encoded:
        return _mask_plain(encoding, len(sides[i][0].prompt), eos)

    return _encode(tokenizer, texts, [where for _, where in sides], True, mask)


def _mask_plain(encoding, prompt: int, eos: int) -> Encoded:
    """Trained is what ends behind the prompt's characters, and the EOS token."""
    ids = encoding.ids
    own = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
    # A token that holds the prompt's last space and the answer's first word is the answer's.
    first = bisect_right(own, prompt, key=lambda i: encoding.token_to_chars(i)[1])
    if ids[-1:] != [eos]:
        ids.append(eos)
    mask = np.zeros(len(ids), bool)
    mask[own[first:]] = True
    mask[-1] = True
    return np.array(ids, np.int32), mask


# Conversations


class _Around(NamedTuple):
    """What a template puts around an answer."""

    lead: str  # between the header and the answer
    tail: str
    end: int  # characters of the tail that end the turn


def _encode_chats(
    tokenizer, sides: list[tuple[Side, str]], train_on: str
) -> list[Encoded | UserError]:
    if not tokenizer.chat_template:
        raise UserError(
            f"{sides[0][1]}: the model has no chat template; name one with "
            "--model.chat_template=NAME (or a file), or set data.strings=plain for plain text."
        )
    texts: list[str | UserError] = []
    spans: list[list[tuple[int, int]]] = []
    around = None
    for side, where in sides:
        messages = [*side.prompt, *side.answer]
        turns = [
            i
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and i >= len(side.prompt) and i not in side.kept_out
        ]
        turns = {"all": turns, "last": turns[-1:], "everything": []}[train_on]
        shown = partial(render, tokenizer, where=where, variables=side.template_kwargs)
        try:
            text, found, around = _spans(tokenizer, shown, messages, turns, where, around)
        except _Refused as error:
            text, found = error, []
        texts.append(text)
        spans.append(found)

    def mask(i: int, encoding: tokenizers.Encoding) -> Encoded:
        return _mask_spans(encoding, spans[i])

    return _encode(tokenizer, texts, [where for _, where in sides], False, mask)


def _mask_spans(encoding, spans: list[tuple[int, int]]) -> Encoded:
    """Trained is what lies within a span. From token to token, characters never go backwards."""
    tokens = range(len(encoding))
    mask = np.zeros(len(tokens), bool)
    for start, end in spans:
        first = bisect_left(tokens, start, key=lambda i: encoding.token_to_chars(i)[0])
        behind = bisect_right(tokens, end, key=lambda i: encoding.token_to_chars(i)[1])
        mask[first:behind] = True
    return np.array(encoding.ids, np.int32), mask


def _spans(
    tokenizer,
    shown: Callable[..., str],
    messages: list[dict],
    turns: list[int],
    where: str,
    around: _Around | None,
) -> tuple[str, list[tuple[int, int]], _Around | None]:
    """A conversation's text, and where its trained turns begin and end, in characters.

    `shown` renders messages. Takes and returns what the template put around the answer before.
    """
    text = shown(messages)
    spans = []
    for i in turns:
        header = shown(messages[:i], generate=True)
        end = around and _known_end(text, header, messages[i]["content"], around)
        if not end:
            through = shown(messages[: i + 1])
            _check_alike(text, header, through, where, i + 1, len(turns))
            marked = shown([*messages[:i], {**messages[i], "content": _MARK}])
            before, _, tail = marked.partition(_MARK)
            length = _end_of_turn(tokenizer, tail)
            # Unknown where the answer or the end of its turn is not to be seen in the text.
            around = _Around(before.removeprefix(header), tail, length) if length else None
            end = len(through) - len(tail) + length
        spans.append((len(header), end))
    return text, spans, around


def _known_end(text: str, header: str, answer: str, around: _Around) -> int:
    """Where a turn ends, if the text has the answer, as it is or stripped, in what was around the
    one before; else 0. This saves two renders of three."""
    for words in (answer, answer.strip()):
        if text.startswith(header + around.lead + words + around.tail):
            return len(header) + len(around.lead) + len(words) + around.end
    return 0


def _check_alike(text: str, header: str, through: str, where: str, turn: int, turns: int) -> None:
    """Refuse a turn that is not rendered alike in every text: alone, and with what follows."""
    if not through.startswith(header):
        raise _Refused(
            f"{where}: the chat template's generation prompt for turn {turn} is not what it puts "
            "before the answer, so the answer's tokens cannot be told apart; name another "
            f"--model.chat_template, a file or one of: {', '.join(templates.NEEDS)}."
        )
    if not text.startswith(through):
        last = "set data.train_on=last, or " if turns > 1 else ""
        raise _Refused(
            f"{where}: the chat template renders turn {turn} otherwise when turns follow it, so "
            f"its tokens cannot be told apart; {last}name another --model.chat_template."
        )


def _end_of_turn(tokenizer, tail: str) -> int:
    """Characters behind an answer that end its turn: through the first special token.

    An added token that is not marked as special counts where no special one follows: of those there
    can be thousands, runs of newlines among them.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special]
    for tokens in (tokenizer.all_special_tokens + special, [token.content for token in added]):
        ends = [tail.index(token) + len(token) for token in tokens if token in tail]
        if ends:
            return min(ends)
    return 0


def special_ids(tokenizer) -> list[int]:
    """Tokens that are no text: begins and ends of texts and turns, and what else is marked so."""
    added = tokenizer.added_tokens_decoder.items()
    marked = {number for number, token in added if token.special}
    return sorted(marked | set(tokenizer.all_special_ids))
