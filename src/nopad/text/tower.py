"""The text tower of an image-text checkpoint: transformers' own text class, loaded when first used."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from nopad.checkpoints.conversions import NameTable
from nopad.checkpoints.files import open_checkpoint
from nopad.checkpoints.formats import Dialect
from nopad.checkpoints.pretrained import config_errors
from nopad.checkpoints.strict import check_sizes, check_strictly
from nopad.checkpoints.untrained import fill
from nopad.published import UNTRAINED
from nopad.text.tokenizer import byte_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder
    from nopad.text.rules import TextRules

_VISION, _TEXT = "_vision_model", "text_model."
_NO_WEIGHTS = re.compile(r"(^|\.)(position_ids|attn_mask|input_resolution|context_length|vocab_size)$")
"""Buffers of transformers' and OpenCLIP's models, and OpenAI's sizes, in older files."""


class TextTower(nn.Module):
    """The text half of transformers' class of both towers, its parameters under that class's names.

    Attributes:
        text_model: transformers' own.
        text_projection: the layer to the image-text space, `None` where the class has none.
        logit_scale, logit_bias: scale and bias of the similarity; `logit_bias` is `None` where the class has none.
        whole_config: config of the class of both towers.
        tokenizer: of the checkpoint.
    """

    def __init__(self, whole_config: Any, rules: TextRules, tokenizer: Any):
        super().__init__()
        with torch.device("meta"):
            whole: Any = AutoModel.from_config(whole_config)
        self.text_model = whole.text_model
        self.text_projection = getattr(whole, "text_projection", None)
        self.logit_scale = whole.logit_scale
        self.register_parameter("logit_bias", getattr(whole, "logit_bias", None))
        self.whole_config = whole_config
        self.rules = rules
        self.tokenizer = tokenizer

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Texts to `(N, E)` in the dtype of the weights, as the original's `get_text_features`."""
        config = self.text_model.config
        inputs = self.tokenizer(
            [self.rules.normalize(self.tokenizer, text) for text in texts],
            padding=self.rules.padding,
            truncation=True,
            max_length=config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.logit_scale.device)
        pooled = self.text_model(**inputs).pooler_output
        return pooled if self.text_projection is None else self.text_projection(pooled)

    def logits(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """`(N, L)` of `(N, E)` and `(L, E)`, as the original's `logits_per_image`."""
        cosines = nn.functional.normalize(image_embeds, dim=1) @ nn.functional.normalize(text_embeds, dim=1).T
        scale = self.logit_scale.to(cosines)
        if hasattr(self.whole_config, "max_logit_scale"):
            scale = scale.clamp(0.0, math.log(self.whole_config.max_logit_scale))
        logits = cosines * scale.exp()
        return logits if self.logit_bias is None else logits + self.logit_bias.to(logits)


def text_tower(encoder: PackedEncoder) -> TextTower:
    """The text tower of an encoder's checkpoint, on the encoder's device and in its dtype.

    Raises:
        ValueError: the checkpoint or its family has none, or a tensor of it is missing, unexpected or misshapen.
        ImportError: its tokenizer needs a package that is not installed.
    """
    tower = encoder.__dict__.get("_text_tower")
    if tower is None:
        tower = encoder.__dict__["_text_tower"] = _load(encoder)  # no submodule: the state dict stays the original's
    return tower.to(encoder.device, encoder.dtype)


def _load(encoder: PackedEncoder) -> TextTower:
    rules, source = encoder.text_rules, encoder.source
    if rules is None:
        raise ValueError(
            f"{encoder.family} checkpoints have no text tower; image-text models are CLIP, SigLIP2, SigLIP, …"
        )
    if source is None:
        raise ValueError("the encoder was not loaded from a checkpoint, so there is no text tower to load")
    if source.startswith(UNTRAINED):
        return _untrained(encoder, rules, source.removeprefix(UNTRAINED))
    checkpoint = open_checkpoint(source, **encoder.opened_with)
    dialect = next(dialect for dialect in encoder.dialects if dialect.name == encoder.dialect)
    left_out = dialect.select(checkpoint).left_out
    stored = {name: tensor for name, tensor in left_out.items() if not _NO_WEIGHTS.search(name)}
    of_texts = Dialect(dialect.name, "", dialect.text_table or NameTable(), prefixes=dialect.text_prefixes)
    checkpoint = of_texts.select(replace(checkpoint, tensors=stored))
    texts = of_texts.convert(checkpoint)
    if not any(name.startswith(_TEXT) or dialect.text_table is None for name in texts.tensors):
        others = sorted(name for name in stored if name.startswith("text."))
        if others:
            raise ValueError(f"checkpoint {source!r}: its text tower is not read: {', '.join(others[:3])}, …")
        raise ValueError(
            f"checkpoint {source!r} has no text tower: its tensors are the vision encoder's alone; load one of both "
            f"towers, or save it by save_pretrained(…, whole=True)"
        )
    if encoder.head is None and encoder.projection is None:
        raise ValueError(
            f"checkpoint {source!r}: texts are compared with what head or projection give, and this encoder "
            f"has neither; load the checkpoint without head=False"
        )
    if dialect.text_table is None:
        raise ValueError(
            f"checkpoint {source!r}: its text tower has {dialect.name} names, which are not read; load the checkpoint "
            f"in transformers' layout"
        )
    with config_errors(checkpoint):
        config = whole_config(encoder, rules.config_fields(texts))
        check_sizes(texts, config.text_config.to_dict(), f"{_TEXT}encoder.layers.")
    tokenizer = load_tokenizer(source, encoder.opened_with, rules.tokenizer)
    with config_errors(checkpoint):
        tower = TextTower(config, rules, tokenizer)
    needed = tower.state_dict()
    check_strictly(checkpoint, of_texts.table.to_file(needed), of_texts)
    try:
        _check_tokenizer(tower)
    except ValueError as error:
        raise ValueError(f"checkpoint {source!r}: {error}; they do not belong together") from None
    return _filled(tower, {name: texts.tensors[name].read() for name in needed}, encoder.dtype)


def _check_tokenizer(tower: TextTower) -> None:
    words, size = tower.tokenizer.vocab_size, tower.text_model.config.vocab_size
    if words > size:
        raise ValueError(f"its tokenizer has {words} words, its text tower {size}")
    tower.rules.check_tokenizer(tower.text_model.config, tower.tokenizer)


def _filled(tower: TextTower, state: dict[str, Tensor], dtype: torch.dtype) -> TextTower:
    """A tower of the meta device with values, by transformers' loader, which also makes buffers that no file has."""
    of_model = {name.removeprefix(_TEXT): tensor for name, tensor in state.items() if name.startswith(_TEXT)}
    options: dict[str, Any] = {"config": tower.text_model.config, "dtype": dtype, "output_loading_info": True}
    options["attn_implementation"] = tower.rules.attn_implementation
    model, info = type(tower.text_model).from_pretrained(None, state_dict=of_model, **options)
    lost = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
    if lost:
        raise ValueError(f"text tower: transformers has not loaded {len(lost)}: {lost[:10]}")
    del tower.text_model
    others = {name: tensor.to(dtype, copy=True) for name, tensor in state.items() if not name.startswith(_TEXT)}
    tower.load_state_dict(others, assign=True)
    tower.text_model = model
    return tower.eval().requires_grad_(False)


def _untrained(encoder: PackedEncoder, rules: TextRules, name: str) -> TextTower:
    fields = dict(rules.published(name))
    tokenizer = byte_tokenizer(has_bos=rules.has_bos, length=fields["max_position_embeddings"])
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    config = whole_config(encoder, {"text_config": {**fields, **special, "vocab_size": len(tokenizer)}})
    random = TextTower(config, rules, tokenizer).to_empty(device="cpu")
    fill(random, 0)
    return _filled(TextTower(config, rules, tokenizer), random.state_dict(), encoder.dtype)


def whole_config(encoder: PackedEncoder, config_fields: Mapping[str, Any]) -> Any:
    """The config of the class of both towers, its vision part the encoder's own.

    Args:
        encoder: the vision tower.
        config_fields: of that config; without `model_type`, the class is the one that the encoder's belongs to.

    Raises:
        ValueError: transformers has no such class.
    """
    config_fields = dict(config_fields)
    rules = encoder.text_rules
    model_type = (rules and rules.model_type) or str(encoder.config.model_type).removesuffix(_VISION)
    of_file = config_fields.pop("model_type", None)
    if of_file in CONFIG_MAPPING and not of_file.endswith(_VISION):
        model_type = of_file
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_MAPPING:
        raise ValueError(
            f"checkpoint {encoder.source!r}: transformers has no model of both towers called {model_type!r}"
        )
    if encoder.projection_dim is not None:
        config_fields["projection_dim"] = encoder.projection_dim
    config: Any = AutoConfig.for_model(model_type, **config_fields)
    encoder_fields = encoder.config.to_dict()
    for name in config.vision_config.to_dict():
        if name in encoder_fields and name not in ("model_type", "architectures", "transformers_version"):
            setattr(config.vision_config, name, encoder_fields[name])
    if getattr(encoder.config, "positions_antialias", False):  # no field of transformers', but one that nopad reads
        config.vision_config.positions_antialias = True
    return config
