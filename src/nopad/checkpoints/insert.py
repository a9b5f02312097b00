"""An encoder's weights in a copy of the checkpoint of a larger model, of which nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nopad.atomic import sync, sync_folder
from nopad.checkpoints.files import PROJECTION, PROJECTION_FILE, SAFETENSORS
from nopad.checkpoints.head_removal import remove_head
from nopad.checkpoints.strict import check_strictly
from nopad.checkpoints.towers import open_tower
from nopad.inference.precision import check_saving
from nopad.json_files import read_json
from nopad.local_paths import check_regular

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def save_into(encoder: PackedEncoder, source: str | Path, target: str | Path, prefix: str | None = None) -> None:
    """Write a copy of the checkpoint of a larger model with this encoder's weights as its vision tower.

    Every other tensor and file is copied byte for byte, and `target` is there as a whole or not at all.

    Args:
        source: a folder of safetensors, on this machine, with a tower of the same architecture.
        target: a folder that does not exist yet.
        prefix: prefix of the tower's tensors; that of the checkpoint that this encoder is from, else searched.

    Raises:
        ValueError: a tower of another architecture, other files than safetensors, weights in another format, or a
            target that exists.
        OSError: as the system raises it.
    """
    check_saving(encoder.precision)
    source, target = Path(source), Path(target)
    prefix = encoder.tower_prefix or None if prefix is None else prefix
    if os.path.lexists(target):
        raise ValueError(f"target: expected a folder that does not exist yet, got {str(target)!r}")
    if not source.is_dir():
        raise ValueError(f"source: expected a folder on this machine, got {str(source)!r}")
    replaced = _by_file(source, _stored(encoder, source, prefix))
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        shutil.copytree(source, folder)
        for file, tensors in replaced.items():
            _overwrite(folder / file, tensors)
        for path in [each for each in folder.rglob("*") if each.is_file()]:
            sync(path)
        os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(target.parent)


def _stored(encoder: PackedEncoder, source: Path, prefix: str | None) -> dict[str, Tensor]:
    """The encoder's tensors under the names of the source's files.

    Raises:
        ValueError: the source has no tower of this family, or one of other sizes.
    """
    checkpoint = open_tower(source, {encoder.family: encoder.dialects}, prefix, use_safetensors=True)
    dialect = type(encoder).dialect_of(checkpoint)
    if dialect is None:
        raise ValueError(
            f"source {str(source)!r}: expected tensors of {encoder.family}"
            + (f" below {checkpoint.prefix!r}" if checkpoint.prefix else "")
            + f", got {sorted(checkpoint.tensors)[:10]}"
        )
    part, state = dialect.select(checkpoint), dialect.table.to_file(encoder.state_dict())
    if encoder.head is None and encoder.projection is None:  # those of the source stay as they are
        part = remove_head(type(encoder), part, dialect)
    check_strictly(part, state, dialect)
    names = {dialect.strip(name): name for name in checkpoint.tensors}
    if state.keys() - names.keys():  # which the dialect has prepared
        raise ValueError(f"source {str(source)!r}: weights under {dialect.name} names cannot be written back there")
    return {checkpoint.prefix + names[name]: tensor.to(part.tensors[name].dtype) for name, tensor in state.items()}


def _by_file(source: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file that holds some."""
    apart = {name: tensor for name, tensor in tensors.items() if name == PROJECTION}
    if apart and os.path.lexists(source / PROJECTION_FILE):  # as `save_pretrained` writes it
        others = {name: tensor for name, tensor in tensors.items() if name != PROJECTION}
        return {**_by_file_of_weights(source, others), PROJECTION_FILE: apart}
    return _by_file_of_weights(source, tensors)


def _by_file_of_weights(source: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    single, index = SAFETENSORS
    if os.path.lexists(source / single):
        return {single: tensors}
    if os.path.lexists(source / index):
        weight_map = read_json(source / index)["weight_map"]
    else:
        files_there = (path.name for path in source.iterdir() if path.suffix == ".safetensors")
        (file,) = (name for name in files_there if name != PROJECTION_FILE)
        return {file: tensors}
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        files.setdefault(weight_map[name], {})[name] = tensor
    return files


def _overwrite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the values of tensors over those of the same names, dtypes and shapes in a safetensors file."""
    check_regular(path)
    path.chmod(path.stat().st_mode | 0o200)  # files of a cache may be read-only
    with path.open("r+b") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
        for name, tensor in tensors.items():
            start, end = header[name]["data_offsets"]
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            assert len(data) == end - start, name  # of equal dtype and shape, as `_stored` has checked
            file.seek(8 + header_bytes + start)
            file.write(data.tobytes())
