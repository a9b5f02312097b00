"""The tokenizer of a checkpoint, and a small one for random weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nopad.extras import install

logger = logging.getLogger(__name__)

_SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
_ANY_REPOSITORY = ("cache_dir", "local_files_only", "force_download", "proxies")
_HUB = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")


def load_tokenizer(name: str, opened: Mapping[str, Any], other: str | None = None) -> Any:
    """The tokenizer beside a checkpoint's weights, else that of another checkpoint.

    Of the arguments, the other gets those that hold for any repository: neither revision nor token.

    Args:
        name: the checkpoint, as the user named it.
        opened: the arguments of `open_checkpoint` that it was opened by.
        other: the checkpoint that has the same tokenizer, `None` where none is known.

    Raises:
        ValueError: there is none, or one without a token that fills up texts.
        ImportError: it needs a package that is not installed.
    """
    tokenizer = _load_any(name, opened, other)
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"checkpoint {name!r}: its tokenizer has no pad token, by which texts get one length; add the model's "
            f'to its tokenizer_config.json as "pad_token"'
        )
    return tokenizer


def _load_any(name: str, opened: Mapping[str, Any], other: str | None) -> Any:
    try:
        return _load(name, opened)
    except ValueError as error:
        if other is None:
            raise
        logger.warning("%s; that of %r is taken, which is the same", error, other)
        try:
            return _load(other, {key: opened[key] for key in _ANY_REPOSITORY if key in opened})
        except ValueError as of_other:
            raise ValueError(
                f"{error}; put the tokenizer of {other!r} beside them, which is the same ({of_other})"
            ) from None


def _load(name: str, opened: Mapping[str, Any]) -> Any:
    path = Path(name).expanduser()
    folder = str(path.parent if path.is_file() else path) if os.path.lexists(path) else name
    options = {key: opened[key] for key in _HUB if opened.get(key) is not None}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except ImportError as error:
        raise ImportError(f"the tokenizer of {name!r} needs a package: {install('text')} ({error})") from error
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:  # as transformers fails without files
        raise ValueError(
            f"checkpoint {name!r}: no tokenizer can be read beside its weights: {' '.join(str(error).split())}"
        ) from error
    # Without a file some classes of transformers make a tokenizer that has no words.
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise ValueError(f"checkpoint {name!r}: no tokenizer can be read beside its weights: tokenizer.json is missing")
    return tokenizer


def byte_tokenizer(*, has_bos: bool, length: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are bytes, 261 in all, for text towers with random weights.

    Args:
        has_bos: whether texts begin with a token of their own.
        length: tokens of a text, at most.
    """
    words = [*_SPECIAL.values(), "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: number for number, word in enumerate(words)}
    # As Gemma's, which transformers' Siglip2Tokenizer expects in the file: what is no word is bytes, a space is ▁.
    model = models.BPE(vocabulary, [], unk_token=_SPECIAL["unk_token"], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos, eos = _SPECIAL["bos_token"], _SPECIAL["eos_token"]
    template = f"{bos} $A {eos}" if has_bos else f"$A {eos}"
    tokens = [(token, vocabulary[token]) for token in (bos, eos)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, padding_side="right", **_SPECIAL
    )
