"""Published checkpoints: find their files, tell their dialect, and check every tensor before one is loaded."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import cached_file

SAFETENSORS = ("model.safetensors.index.json", "model.safetensors")
PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
META = "model.pth"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape and dtype at once, its values when asked."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def __getitem__(self, index: Any) -> Tensor:
        """The values, as transformers' loader asks a safetensors slice for them."""
        return self.read()[index]


@dataclass(frozen=True)
class Checkpoint:
    """What lies in a checkpoint, before anything of it is loaded.

    Attributes:
        name: as the user named it.
        tensors: every tensor by its stored name.
        config: `config.json`, `{}` where there is none.
        preprocessor: `preprocessor_config.json`, `None` where there is none.
        left_out: tensors that the dialect drops; some of them still tell about the architecture.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] | None = None
    left_out: Mapping[str, StoredTensor] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self.tensors:
            raise ValueError(f"checkpoint {self.name!r}: tensor {name!r} is missing, it tells the architecture")
        return self.tensors[name].shape

    def count(self, prefix: str) -> int:
        """How many numbered modules stand under `prefix`: one more than the highest number, 0 where there is none."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return max((int(match[1]) + 1 for name in self.tensors if (match := pattern.match(name))), default=0)


@dataclass(frozen=True)
class Dialect:
    """One way in which a family's checkpoints name their tensors.

    Attributes:
        name: for messages and reports.
        signature: a pattern that tensor names of this dialect match, and those of no other.
        conversions: gives fresh transformers conversions from this dialect's names to the encoder's.
        prefixes: taken off tensor names before anything else (the tower's name in a composite checkpoint).
        dropped: patterns of tensors that are no part of the vision encoder.
        is_original: whether transformers' own class reads these names as they are.
        requires: further patterns, each of which some name must match, where no one name tells dialects apart.
        excludes: patterns that no name may match, where a dialect's names are all found in another's.
    """

    name: str
    signature: str
    conversions: Callable[[], list[WeightConverter | WeightRenaming]]
    prefixes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    is_original: bool = False
    requires: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()

    def matches(self, names: Iterable[str]) -> bool:
        """Whether tensor names speak this dialect."""
        stripped = [self.strip(name) for name in names]
        found = [any(re.search(p, name) for name in stripped) for p in (self.signature, *self.requires)]
        return all(found) and not any(re.search(p, name) for p in self.excludes for name in stripped)

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
        return Checkpoint(checkpoint.name, tensors, checkpoint.config, checkpoint.preprocessor, left_out)


class Unstack(ConversionOps):
    """Drop leading axes of length one; the reverse puts them back."""

    def __init__(self, axes: int = 1, *, add: bool = False):
        self.axes, self.add = axes, add

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> Any:
        tensor = _only(input_dict)
        for _ in range(self.axes):
            # Another leading length is left as it is: the strict check has reported it as misshapen.
            tensor = tensor.unsqueeze(0) if self.add else tensor.squeeze(0)
        return {target_patterns[0]: tensor}

    @property
    def reverse_op(self) -> ConversionOps:
        return Unstack(self.axes, add=not self.add)


class FlattenPatchKernel(ConversionOps):
    """Convolution kernel `(D, C, p, p)` to the matrix `(D, P)` over patches in `config.patch_order`."""

    def __init__(self, *, unflatten: bool = False):
        self.unflatten = unflatten

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> Any:
        weight, config = _only(input_dict), kwargs["config"]
        hwc = config.patch_order == "hwc"
        if self.unflatten:
            side, channels = config.patch_size, config.num_channels
            shape = (side, side, channels) if hwc else (channels, side, side)
            weight = weight.unflatten(1, shape)
            weight = weight.permute(0, 3, 1, 2) if hwc else weight
        else:
            weight = (weight.permute(0, 2, 3, 1) if hwc else weight).flatten(1)
        return {target_patterns[0]: weight.contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        return FlattenPatchKernel(unflatten=not self.unflatten)


def _only(input_dict: dict[str, Any]) -> Tensor:
    """The one tensor that a one-to-one conversion is given, in a list while loading."""
    (tensor,) = input_dict.values()
    return tensor[0] if isinstance(tensor, list) else tensor


def open_checkpoint(name: str | Path, *, revision: str | None = None, **hub: Any) -> Checkpoint:
    """Open a checkpoint without loading it.

    Args:
        name: a folder, a single `.safetensors`, `.pth`, `.pt` or `.bin` file, or a name on the Hugging Face Hub.
        revision: branch, tag or commit on the Hub.
        hub: `cache_dir`, `token`, `local_files_only`, `force_download`, `subfolder`, as transformers takes them.

    Raises:
        ValueError: no weights there, or files that hold something else.
        OSError: neither a file nor a folder, and the Hub does not have it or cannot be reached.
    """
    name = str(name)
    path = Path(name).expanduser()
    if path.is_file():
        return Checkpoint(name, _read_file(path))
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise OSError(f"checkpoint {name!r}: neither a file nor a folder, and no name on the Hub (owner/model)")
    find = partial(_find, str(path) if path.is_dir() else name, revision=revision, **hub)
    config = _read_json(find("config.json"))
    files = _weight_files(name, path if path.is_dir() else None, find)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= _read_file(file)
    return Checkpoint(name, tensors, config or {}, _read_json(find("preprocessor_config.json")))


def _find(name: str, filename: str, **hub: Any) -> Path | None:
    found = cached_file(name, filename, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


def _weight_files(name: str, folder: Path | None, find: Callable[[str], Path | None]) -> list[Path]:
    for index, single in (SAFETENSORS, PICKLES):
        if (path := find(index)) is not None:
            weight_map = json.loads(path.read_text())["weight_map"]
            shards = {shard: find(shard) for shard in sorted(set(weight_map.values()))}
            missing = [shard for shard, found in shards.items() if found is None]
            if missing:
                raise ValueError(
                    f"checkpoint {name!r}: {index} names {len(missing)} files that are missing: {missing[:10]}"
                )
            return [found for found in shards.values() if found is not None]
        if (path := find(single)) is not None:
            return [path]
    if (path := find(META)) is not None:
        return [path]
    if folder is not None:
        for suffixes in ((".safetensors",), PICKLE_SUFFIXES):
            files = sorted(file for file in folder.iterdir() if file.suffix in suffixes)
            if len(files) == 1:
                return files
            if files:
                raise ValueError(
                    f"checkpoint {name!r}: expected one weights file or an index, got {[file.name for file in files]}; "
                    f"name the file itself"
                )
    expected = f"expected one of {', '.join((*SAFETENSORS, *PICKLES))}"
    if folder is None:
        raise OSError(
            f"checkpoint {name!r}: neither a file nor a folder, and no weights of that name on the Hub, or no way "
            f"there; {expected}. 'untrained:{name}' gives a published architecture with random weights"
        )
    raise ValueError(f"checkpoint {name!r}: no weights there; {expected}, or one *.safetensors or *.pth file")


def _read_json(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_file(path: Path) -> dict[str, StoredTensor]:
    if path.suffix == ".safetensors":
        try:
            handle = safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise ValueError(f"checkpoint file {str(path)!r}: expected safetensors, got {error}") from error
        tensors = {}
        for name in handle.keys():  # noqa: SIM118 - the handle is no dict
            part = handle.get_slice(name)
            dtype = handle.get_tensor(name).dtype
            # clone: the file stays mapped otherwise, and saving over it would change the weights in use.
            tensors[name] = StoredTensor(
                tuple(part.get_shape()), dtype, lambda name=name: handle.get_tensor(name).clone()
            )
        return tensors
    if path.suffix not in PICKLE_SUFFIXES:
        raise ValueError(
            f"checkpoint file {str(path)!r}: expected .safetensors, .pth, .pt or .bin, got {path.suffix!r}"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"checkpoint file {str(path)!r}: expected tensors and nothing else, got {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = list(content)[:10] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"checkpoint file {str(path)!r}: expected a flat dict of tensors, got {keys}")
    return {name: StoredTensor(tuple(value.shape), value.dtype, lambda v=value: v) for name, value in content.items()}


def original_state_dict(
    model: PreTrainedModel, conversions: list[WeightConverter | WeightRenaming]
) -> dict[str, Tensor]:
    """The model's tensors under the names and in the shapes of a dialect; on the meta device, what a file must hold."""
    # transformers reverts the conversions that it finds noted on the model.
    before = model.__dict__.get("_weight_conversions")
    try:
        model.__dict__["_weight_conversions"] = conversions
        return revert_weight_conversion(model, model.state_dict())
    finally:
        model.__dict__["_weight_conversions"] = before


def check_strictly(checkpoint: Checkpoint, expected: Mapping[str, Tensor], dialect: Dialect) -> None:
    """Compare what a checkpoint holds with what the architecture needs, name by name and shape by shape.

    Raises:
        ValueError: lists the missing, unexpected and misshapen tensors, ten of each and their count.
    """
    tensors = checkpoint.tensors
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    misshapen = [
        f"{name} (got {tensors[name].shape}, expected {tuple(expected[name].shape)})"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != tuple(expected[name].shape)
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(
            f"checkpoint {checkpoint.name!r} ({dialect.name} names) does not fit the architecture that its config and "
            f"tensors tell: {'; '.join(problems)}"
        )
