"""Tables that lead from the tensor names of a dialect to those of the packed model, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reshape:
    """Conversion of a tensor of a file to the values of parameters, and back.

    Attributes:
        parts: one tensor of the file to the values of each parameter.
        whole: the values of the parameters to the tensor of the file; `None` stands for a parameter that the model does
            not have.
    """

    parts: Callable[[Tensor], Sequence[Tensor]]
    whole: Callable[[Sequence[Tensor | None]], Tensor]


def _only(values: Sequence[Tensor | None]) -> Tensor:
    (value,) = values
    assert value is not None
    return value


def _as_grid(table: Tensor) -> Tensor:
    side = math.isqrt(len(table))
    return table.unflatten(0, (side, side)).unsqueeze(0)


def join_rows(values: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, which of meta tensors is Python code that imports torch's compiler."""
    first = values[0]
    return first.new_empty(sum(map(len, values)), *first.shape[1:]) if first.is_meta else torch.cat([*values])


def _stack_rows(values: Sequence[Tensor | None]) -> Tensor:
    like = next(value for value in values if value is not None)
    return join_rows([torch.zeros_like(like) if value is None else value for value in values])


def split_rows(num_parts: int) -> Reshape:
    """Equally many rows for each of several parameters, zeros where the model does not have one."""
    return Reshape(lambda tensor: tensor.chunk(num_parts), _stack_rows)


def halves_of_pairs(num_heads: int) -> Reshape:
    """Rows of rotated channels: in the file the two of a pair are neighbours, in the model half a head apart."""
    return Reshape(
        lambda tensor: (tensor.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2),),
        lambda values: _only(values).unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2),
    )


SAME = Reshape(lambda tensor: (tensor,), _only)
DROP_AXIS = Reshape(lambda tensor: (tensor.squeeze(0),), lambda values: _only(values).unsqueeze(0))
"""`(1, …)` in the file, `(…)` in the model."""
ADD_AXIS = Reshape(lambda tensor: (tensor.unsqueeze(0),), lambda values: _only(values).squeeze(0))
"""`(…)` in the file, `(1, …)` in the model."""
ADD_FRAMES = Reshape(lambda tensor: (tensor.unsqueeze(2),), lambda values: _only(values).squeeze(2))
"""A kernel `(D, C, h, w)` in the file; in the model `(D, C, 1, h, w)`, of a single frame."""
DROP_AXES = Reshape(lambda tensor: (tensor.squeeze(0).squeeze(0),), lambda values: _only(values)[None, None])
"""`(1, 1, …)` in the file, `(…)` in the model."""
WITHOUT_FIRST = Reshape(
    lambda tensor: (torch.nn.functional.pad(tensor, (0, 0, 1, 0)),), lambda values: _only(values)[:, 1:]
)
"""`(1, N, D)` in the file; in the model `(1, 1 + N, D)`, of which the first row is zero."""
TRANSPOSED = Reshape(lambda tensor: (tensor.T.contiguous(),), lambda values: _only(values).T.contiguous())
"""A matrix of which file and model have each other's transpose."""
SQUARE_GRID = Reshape(lambda tensor: (tensor.squeeze(0).flatten(0, 1),), lambda values: _as_grid(_only(values)))
"""`(1, side, side, D)` in the file, `(side², D)` in the model."""


class Rename:
    """One line of a dialect's table.

    `*` stands for one part of a dotted name, `**` for one or more at the end: `Rename("blocks.*.ln_1.**",
    "layers.*.norm1.**")`.

    Args:
        file: a name in the file.
        *model: the names of the parameters that it becomes.
        reshape: how.
        optional: some of the parameters may be missing in the model, whose values are zeros in the file.
    """

    def __init__(self, file: str, *model: str, reshape: Reshape = SAME, optional: bool = False):
        self.file, self.model, self.reshape, self.optional = file, model, reshape, optional

    def to_model(self, name: str) -> list[str] | None:
        """The parameters that a tensor of the file becomes; `None` where the line is not about it."""
        match = self._file_pattern.fullmatch(name)
        return None if match is None else [_fill(template, match.groups()) for template in self.model]

    def to_file(self, name: str) -> str | None:
        """The tensor of the file that a parameter comes from; `None` where the line is not about it."""
        for pattern in self._model_patterns:
            match = pattern.fullmatch(name)
            if match is not None:
                return _fill(self.file, match.groups())
        return None

    @cached_property
    def _file_pattern(self) -> re.Pattern[str]:
        return _pattern(self.file)

    @cached_property
    def _model_patterns(self) -> list[re.Pattern[str]]:
        return [_pattern(template) for template in self.model]


def split_qkv(file: str, attention: str, kind: str = "*", *, optional: bool = False) -> Rename:
    """The line for queries, keys and values in one tensor of the file, thirds of its rows.

    Args:
        file: its name.
        attention: the module of the packed model that has `q_proj`, `k_proj` and `v_proj`.
        kind: `"weight"`, `"bias"` or both.
        optional: as `Rename` takes it.
    """
    parts = [f"{attention}.{part}_proj.{kind}" for part in "qkv"]
    return Rename(file, *parts, reshape=split_rows(3), optional=optional)


def _pattern(template: str) -> re.Pattern[str]:
    parts = {"*": r"([^.]+)", "**": "(.+)"}
    return re.compile(r"\.".join(parts.get(part, re.escape(part)) for part in template.split(".")))


def _fill(template: str, values: Iterable[str]) -> str:
    left = iter(values)
    return ".".join(next(left) if part in ("*", "**") else part for part in template.split("."))


@dataclass(frozen=True)
class Join:
    """A line of a dialect's table: the rows of several tensors of the file are those of one parameter.

    Attributes:
        files: names in the file, in the order of their rows.
        model: the name of the parameter.
        shares: how the rows are divided: `(1, 2)` is a third and two thirds.
    """

    files: tuple[str, ...]
    model: str
    shares: tuple[int, ...]

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """A parameter's values as the tensors of the file."""
        rows = len(value) // sum(self.shares)
        return dict(zip(self.files, value.split([share * rows for share in self.shares]), strict=True))


@dataclass(frozen=True)
class Part:
    """The place of a parameter's values in a file.

    Attributes:
        names: name of the tensor, or names of several whose rows follow each other.
        rename: what becomes of the tensor.
        index: the part of that.
    """

    names: tuple[str, ...]
    rename: Rename
    index: int


class NameTable:
    """All lines of a dialect; names that no line is about stay as they are.

    Args:
        *lines: of which at most one is about a name, in either direction.
    """

    def __init__(self, *lines: Rename | Join):
        self.renames = [line for line in lines if isinstance(line, Rename)]
        self.joins = [line for line in lines if isinstance(line, Join)]

    def parts(self, names: Iterable[str]) -> dict[str, Part]:
        """For each parameter that the tensors `names` of a file give, where its values are."""
        parts, left = {}, dict.fromkeys(names)
        for join in self.joins:
            if left.keys() >= set(join.files):
                parts[join.model] = Part(join.files, Rename(join.model, join.model), 0)
                left = {name: None for name in left if name not in join.files}
        for name in left:
            rename, targets = self._line_of(name)
            parts |= {target: Part((name,), rename, index) for index, target in enumerate(targets)}
        return parts

    def _line_of(self, name: str) -> tuple[Rename, list[str]]:
        for rename in self.renames:
            targets = rename.to_model(name)
            if targets is not None:
                return rename, targets
        return Rename(name, name), [name]

    def of_renames(self) -> NameTable:
        """The lines that rename alone."""
        return NameTable(*(rename for rename in self.renames if rename.reshape is SAME))

    def file_name(self, name: str) -> str:
        """The tensor of the file that a parameter comes from, the first of several."""
        for join in self.joins:
            if join.model == name:
                return join.files[0]
        return next((file for rename in self.renames if (file := rename.to_file(name)) is not None), name)

    def to_file(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model's tensors under the names and in the shapes of the file; of the meta device, what it must hold."""
        stored = {}
        for join in self.joins:
            if join.model in state:
                stored |= join.split(state[join.model])
        joined = {join.model for join in self.joins}
        for file in dict.fromkeys(self.file_name(name) for name in state if name not in joined):
            rename, names = self._line_of(file)
            if rename.optional or all(name in state for name in names):
                stored[file] = rename.reshape.whole([state.get(name) for name in names])
        return stored
