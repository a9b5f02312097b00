"""Checkpoints before they are loaded: their tensors and config, and the dialects that name the tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nopad.checkpoints.conversions import NameTable
from nopad.checkpoints.stored_tensor import StoredTensor, joined

_SIDES = ("image_size", "patch_size", "temporal_patch_size", "rope_grid_side")
"""Fields of configs that files may have as height and width, where the encoders have squares."""


def grid_side(num_positions: int, label: str) -> int:
    """Side of the square grid of learned positions, one per patch.

    Raises:
        ValueError: their number is not a square.
    """
    side = math.isqrt(max(num_positions, 0))
    if side**2 != num_positions:
        raise ValueError(f"{label}: expected a square number of learned positions, got {num_positions}")
    return side


def trained_grid(config: Any) -> tuple[int, int]:
    """`(rows, columns)` of the patches of an image of `config.image_size`, on which positions were learned."""
    side = config.image_size // config.patch_size
    return side, side


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint before anything of it is loaded.

    Attributes:
        name: the checkpoint as the user named it.
        tensors: every tensor by its stored name.
        config: `config.json`, `{}` where there is none.
        preprocessor: `image_processor` of `processor_config.json` or `preprocessor_config.json`, `None` where there is
            neither.
        left_out: tensors that the dialect drops; the architecture may depend on some of them.
        table: leads from the names of the file to those of `tensors`.
        folder: where `config.json` was found, on this machine; `None` where there is none.
        choice: `variant` and `use_safetensors`, where the files were chosen by them.
        opened_with: all arguments of `open_checkpoint` beside the name that open it again; a token is not pickled.
        prefix: prefix of the tensors in the file, where they are a tower's in a larger model.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] | None = None
    left_out: Mapping[str, StoredTensor] = field(default_factory=dict)
    table: NameTable = field(default_factory=NameTable)
    folder: Path | None = None
    choice: Mapping[str, Any] = field(default_factory=dict)
    opened_with: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """`quantization_config` of `config.json`, `None` without it."""
        return self.config.get("quantization_config")

    @property
    def vision_config(self) -> dict[str, Any]:
        """`vision_config` of `config.json`, or all of it where there is nothing in such a part."""
        return dict(self.config.get("vision_config") or self.config)

    @property
    def config_dtype(self) -> str | None:
        """The dtype in `config.json`, `None` without it."""
        for config in (self.config, self.vision_config):
            for name in ("dtype", "torch_dtype"):
                if config.get(name) not in (None, "auto"):
                    return config[name]
        return None

    @property
    def dtype(self) -> torch.dtype | str:
        """The dtype in `config.json`, else the one that holds all weights, as transformers' `"auto"`."""
        if self.config_dtype is not None:
            return self.config_dtype
        return reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors.values()))

    def check_model_type(self, *expected: str) -> None:
        """Refuse the config of another architecture: some name their tensors as the one that they derive from does.

        Raises:
            ValueError: a `model_type` that transformers implements and that is not one of `expected`.
        """
        model_type = self.vision_config.get("model_type", self.config.get("model_type"))
        if model_type in CONFIG_MAPPING and model_type not in expected:
            raise ValueError(
                f"checkpoint {self.name!r}: expected model_type {' or '.join(expected)} in its config.json, got "
                f"{model_type!r}, another architecture whose tensors have the same names"
            )

    def with_sides(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Fields of a config, sizes of squares as one number where they are two equal ones.

        Raises:
            ValueError: they differ.
        """
        sides = {name: fields[name] for name in _SIDES if isinstance(fields.get(name), list | tuple)}
        for name, value in sides.items():
            if len(value) != 2 or value[0] != value[1]:
                raise ValueError(
                    f"checkpoint {self.name!r}: {name}: expected one number or two that are equal, got {value}"
                )
        return fields | {name: value[0] for name, value in sides.items()}

    def shape(self, name: str, ndim: int | None = None) -> tuple[int, ...]:
        """Shape of a tensor.

        Args:
            name: the tensor's name in the packed model.
            ndim: how many sides it must have; any number unless given.

        Raises:
            ValueError: there is none of this name, or it has another number of sides.
        """
        if name not in self.tensors:
            stored = self.table.file_name(name)
            raise ValueError(f"checkpoint {self.name!r}: tensor {stored!r} is missing; the config follows its shape")
        shape = self.tensors[name].shape
        if ndim not in (None, len(shape)):
            stored = self.table.file_name(name)
            raise ValueError(f"checkpoint {self.name!r}: {stored!r} is misshapen: expected {ndim} sides, got {shape}")
        return shape

    def num_heads(self, hidden_size: int, head_dim: int) -> int:
        """Number of attention heads by the head size that all published models of a family have.

        Raises:
            ValueError: heads of this size do not fill the width.
        """
        if hidden_size % head_dim:
            raise ValueError(
                f"checkpoint {self.name!r}: without config.json heads are {head_dim} wide as in the published models, "
                f"but its width is {hidden_size}; add a config.json with num_attention_heads"
            )
        return hidden_size // head_dim

    def num_heads_by_width(self, hidden_size: int, heads: Mapping[int, int]) -> int:
        """Number of attention heads by the width, of the published models of a family.

        Raises:
            ValueError: another width than theirs.
        """
        if hidden_size not in heads:
            raise ValueError(
                f"checkpoint {self.name!r}: without config.json the number of heads is known for the published widths "
                f"{sorted(heads)}, but its width is {hidden_size}; add a config.json with num_attention_heads"
            )
        return heads[hidden_size]

    def count(self, prefix: str) -> int:
        """Number of numbered modules under `prefix`, 0 where there is none.

        Raises:
            ValueError: their numbers are not 0, 1, 2, …
        """
        pattern = re.compile(re.escape(prefix) + r"(\d{1,9})\.")
        numbers = {int(match[1]) for name in self.tensors if (match := pattern.match(name))}
        if missing := set(range(len(numbers))) - numbers:
            raise ValueError(
                f"checkpoint {self.name!r}: expected layers 0 to {len(numbers) - 1}, since it has tensors of "
                f"{len(numbers)}, got none of layers {sorted(missing)[:10]}"
            )
        return len(numbers)


@dataclass(frozen=True)
class Dialect:
    """One way in which a family's checkpoints name their tensors.

    Attributes:
        name: for messages and reports.
        signature: a pattern that tensor names of this dialect match, and those of no other.
        table: leads from this dialect's names to the packed model's, and back.
        prefixes: taken off tensor names before anything else (the tower's name in a composite checkpoint).
        dropped: patterns of tensors that are no part of the vision encoder.
        is_original: whether the original class reads these names as they are.
        requires: further patterns, each of which some name must match, where no one name tells dialects apart.
        excludes: patterns that no name may match, where a dialect's names are all found in another's.
        prepare: hook applied to the selected tensors before `table`.
        text_table: leads from the dropped tensors to the text half of the original class of both towers
            (`text_model.…`, `text_projection.weight`, `logit_scale`); `None` where that half is not read.
        text_prefixes: taken off their names before that.
    """

    name: str
    signature: str
    table: NameTable = field(default_factory=NameTable)
    prefixes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    is_original: bool = False
    requires: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    prepare: Callable[[Checkpoint], Checkpoint] = lambda checkpoint: checkpoint
    text_table: NameTable | None = None
    text_prefixes: tuple[str, ...] = ()

    def matches(self, names: Iterable[str]) -> bool:
        """Whether these are tensor names of this dialect."""
        stripped = [self.strip(name) for name in names]
        required = [any(re.search(p, name) for name in stripped) for p in (self.signature, *self.requires)]
        return all(required) and not any(re.search(p, name) for p in self.excludes for name in stripped)

    def strip(self, name: str) -> str:
        """A tensor name without the tower's prefix."""
        for prefix in self.prefixes:
            if name.startswith(prefix):
                return name.removeprefix(prefix)
        return name

    def select(self, checkpoint: Checkpoint) -> Checkpoint:
        """The vision encoder's part of a checkpoint, without prefixes."""
        dropped = [re.compile(pattern) for pattern in self.dropped]
        tensors: dict[str, StoredTensor] = {}
        left_out: dict[str, StoredTensor] = {}
        for name, tensor in checkpoint.tensors.items():
            if any(pattern.search(name) for pattern in dropped):
                left_out[name] = tensor
                continue
            if self.strip(name) in tensors:
                raise ValueError(
                    f"checkpoint {checkpoint.name!r}: {self.strip(name)!r} is there with and without prefix"
                )
            tensors[self.strip(name)] = tensor
        return self.prepare(replace(checkpoint, tensors=tensors, left_out=left_out))

    def convert(self, checkpoint: Checkpoint) -> Checkpoint:
        """A selected checkpoint under the packed model's names; values are split and reshaped as they are read."""
        parts = self.table.parts(checkpoint.tensors)
        tensors = {name: joined([checkpoint.tensors[n] for n in part.names]).part(part) for name, part in parts.items()}
        return replace(checkpoint, tensors=tensors, table=self.table)


def matching_dialect(dialects: Iterable[Dialect], checkpoint: Checkpoint) -> Dialect | None:
    """The dialect of a checkpoint's tensor names, `None` where it is none of these.

    Raises:
        ValueError: names of several dialects.
    """
    matching = [dialect for dialect in dialects if dialect.matches(checkpoint.tensors)]
    if len(matching) > 1:
        raise ValueError(f"checkpoint {checkpoint.name!r}: its names mix {' and '.join(d.name for d in matching)}")
    return matching[0] if matching else None
