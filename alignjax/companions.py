"""What lies beside a trained model's weights and is not its source's: template, ends, padding."""

import json
from typing import Annotated, Any, TypedDict

from alignjax.data.chat import end_of_turn_id
from alignjax.files import read_json
from alignjax.validate import Bound
from alignjax.weights.source import Source, decoder_config

_GENERATION = "generation_config.json"
_Id = Annotated[int, Bound(0, 2**31 - 1)]


class _Generation(TypedDict):
    """What is read of generation_config.json."""

    eos_token_id: _Id | list[_Id] | None


def of_trained(source: Source, tokenizer, chat_template: str) -> dict[str, str]:
    """The files without which the model is not used as it was trained, name -> text.

    A chat template that was given. generation_config.json, where the source's does not end an
    answer with the token that the template ends it with. A reward model's tokenizer, where it pads
    with another token than config.json says: transformers takes the reward before those.
    """
    files = {}
    if chat_template:
        files["chat_template.jinja"] = tokenizer.chat_template
    generation = _held(source, _GENERATION, _Generation)
    ends = _listed(generation.get("eos_token_id", source.config.get("eos_token_id")))
    if end_of_turn_id(tokenizer) not in (None, *ends):
        generation["eos_token_id"] = eos_ids(source, tokenizer)
        files[_GENERATION] = _text(generation)
    pad = source.config.get("pad_token_id")
    if decoder_config(source).scored and pad not in (None, tokenizer.pad_token_id):
        named = {"pad_token": tokenizer.convert_ids_to_tokens(pad)}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (source.tokenizer_dir / name).is_file():
                files[name] = _text(_held(source, name) | named)
    return files


def eos_ids(source: Source, tokenizer) -> list[int]:
    """Every token that ends an answer, by template, generation config and model config."""
    found = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    for stored in (source.config, _held(source, _GENERATION, _Generation)):
        found |= set(_listed(stored.get("eos_token_id")))
    return sorted(found - {None})


def _held(source: Source, name: str, kind: Any = dict) -> dict:
    """What a JSON file of the source says; nothing where it is not there."""
    file = source.tokenizer_dir / name
    return read_json(file, kind) if file.is_file() else {}


def _listed(ids: int | list[int] | None) -> list[int | None]:
    return ids if isinstance(ids, list) else [ids]


def _text(content: dict) -> str:
    return json.dumps(content, indent=2) + "\n"
