"""The tokenizer that a GGUF file carries in its metadata, as files that transformers reads."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from alignjax import validate
from alignjax.errors import UserError
from alignjax.files import whole_directory

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # llama.cpp's types of tokens that the text is split at

# How byte-level tokenizers split a text into words before they merge, by llama.cpp's name for it.
# The expressions are those of the models' own tokenizer.json files.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TITLED = f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*"
SPLITS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_SPACES}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORD}\p{{L}}+|\p{{N}}|{_SYMBOLS}[\r\n]*|{_SPACES}",
    "tekken": rf"{_TITLED}|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_SPACES}",
}


_IDS = tuple(f"{role}_token_id" for role in ("bos", "eos", "eot", "unknown", "padding"))
_Tokens = TypedDict(
    "_Tokens",
    {"tokens": list[str], "token_type": list[int], "scores": list[float], "merges": list[str]}
    | {"model": str, "pre": str, **dict.fromkeys(_IDS, int)}
    | dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix"), bool),
)
# What llama.cpp takes a SentencePiece file to mean where it says nothing.
_SENTENCEPIECE = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


def check_tokenizer(meta: dict, path: Path) -> None:
    """Refuses a tokenizer's metadata of wrong types or lengths; adds what llama.cpp would."""
    start = "tokenizer.ggml."
    found = {key.removeprefix(start): meta[key] for key in meta if key.startswith(start)}
    # An array is of one type throughout.
    first = {key: one[:1] if isinstance(one, list) else one for key, one in found.items()}
    validate.check(first, _Tokens, str(path), start[:-1])
    if found.get("model") == "llama":
        found = _SENTENCEPIECE | {"add_bos_token": True} | found
    elif found.get("pre") in ("llama-bpe", "tekken") and "bos_token_id" in found:
        found = {"add_bos_token": True} | found
    needed = ["model", "tokens", *(["merges"] if found.get("model") == "gpt2" else [])]
    needed += [f"{role}_token_id" for role in ("bos", "eos") if found.get(f"add_{role}_token")]
    for key in needed:
        if key not in found:
            raise UserError(f"{path}: the metadata lacks the key '{start}{key}'.")
    count = len(found["tokens"])
    found = {"scores": [0.0] * count, "token_type": [_NORMAL] * count} | found
    for key in ("scores", "token_type"):
        if len(found[key]) != count:
            raise UserError(
                f"{path}: {start}{key} has {len(found[key])} entries for {count} tokens."
            )
    for key in _IDS:
        if not 0 <= found.get(key, 0) < count:
            raise UserError(f"{path}: {start}{key}={found[key]}, but there are {count} tokens.")
    meta |= {start + key: value for key, value in found.items()}


def tokenizer_dir(meta: dict, path: Path, cache: Path) -> Path:
    """Writes tokenizer files as transformers reads them, once, and names their directory."""
    arch = meta["general.architecture"]
    wanted = {name: value for name, value in meta.items() if name.startswith("tokenizer.")}
    key = hashlib.sha256(json.dumps([2, arch, wanted], sort_keys=True).encode()).hexdigest()[:16]
    target = cache / "tokenizers" / key
    if target.is_dir():
        return target
    from transformers import PreTrainedTokenizerFast

    tokens = meta["tokenizer.ggml.tokens"]
    named = {
        f"{role}_token": tokens[meta[f"tokenizer.ggml.{ours}_token_id"]]
        for role, ours in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if meta.get(f"tokenizer.ggml.{ours}_token_id") is not None
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_with_ends(build_tokenizer(meta, path), meta),
        clean_up_tokenization_spaces=False,
        model_max_length=meta[f"{arch}.context_length"],
        **named,
    )
    tokenizer.chat_template = meta.get("tokenizer.chat_template")
    ends = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    generation = {
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({meta[name] for name in ends if name in meta}),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    with whole_directory(target) as directory:
        tokenizer.save_pretrained(directory)
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return target


def _with_ends(tokenizer, meta: dict):
    """The tokenizer, which begins or ends every text with BOS or EOS if the metadata says so."""
    from tokenizers.processors import TemplateProcessing

    adds = [role for role in ("bos", "eos") if meta.get(f"tokenizer.ggml.add_{role}_token")]
    ids = [meta[f"tokenizer.ggml.{role}_token_id"] for role in adds]
    names = [tokenizer.id_to_token(number) for number in ids]
    begin, end = names[: "bos" in adds], names["bos" in adds :]
    one, other = ([*begin, text, *end] for text in ("$A", "$B"))
    special = list(zip(names, ids, strict=True))
    if adds:
        tokenizer.post_processor = TemplateProcessing(one, one + other, special)
    return tokenizer


def build_tokenizer(meta: dict, path: Path):
    """The tokenizer that a GGUF file's metadata describes, of the tokenizers library."""
    from tokenizers import AddedToken

    kind, arch = meta["tokenizer.ggml.model"], meta["general.architecture"]
    tokens = meta["tokenizer.ggml.tokens"]
    if kind == "gpt2":
        tokenizer = _byte_level(meta, path)
    elif kind == "llama" and arch in ("llama", "gemma"):
        # Gemma's runs of spaces are stored as such.
        tokens = [token if token.strip(" ") else "▁" * len(token) for token in tokens]
        tokenizer = _sentencepiece(meta, tokens)
    else:
        raise _refusal(path, f"tokenizer {kind!r} of a {arch} model")
    types = meta["tokenizer.ggml.token_type"]
    tokenizer.add_tokens(
        [
            AddedToken(token, special=type_ == _CONTROL, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def _byte_level(meta: dict, path: Path):
    """Byte-level BPE, its splitting told by name."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = meta.get("tokenizer.ggml.pre")
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name in SPLITS:
        split = [pre_tokenizers.Split(Regex(SPLITS[name]), behavior="isolated"), plain]
    elif name in ("smollm", "gpt-2"):
        digits = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
        split = [*digits, gpt2]
    else:
        raise _refusal(path, f"tokenizer 'gpt2' with pre-tokenizer {name!r}")
    vocab = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = []
    for i, merge in enumerate(meta["tokenizer.ggml.merges"]):
        one, _, other = merge.partition(" ")
        if not {one, other, one + other} <= vocab.keys():
            raise UserError(
                f"{path}: tokenizer.ggml.merges[{i}]={merge!r}: it must be two tokens that make a "
                "third, with a space between them."
            )
        merges.append((one, other))
    # Llama 3 takes a word that is a token as that token, whatever its merges would give.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(meta: dict, tokens: list[str]):
    """SentencePiece's BPE with bytes to fall back to, as Llama 2, Mistral and Gemma have it.

    A GGUF file has no merges of it: a token may be made of any two others, and among pairs that
    could be joined the one whose token has the highest score is first.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    gemma = meta["general.architecture"] == "gemma"
    # Gemma's scores do not tell the order of its merges; the order of the file does.
    scores = range(0, -len(tokens), -1) if gemma else meta["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(vocab, scores)
    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    bpe = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefix = meta.get("tokenizer.ggml.add_space_prefix", not gemma)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return tokenizer


def _merges(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a third; best first, then that with the longer beginning."""
    found = []
    for token in sorted(vocab, key=lambda token: -scores[vocab[token]]):
        pairs = ((token[:i], token[i:]) for i in range(len(token) - 1, 0, -1))
        found += [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    return found


def _refusal(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: {what} is not supported in a GGUF file; give the Hugging Face directory of the "
        "model as model.path instead."
    )
