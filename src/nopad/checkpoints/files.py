"""Where a checkpoint's files are, in a folder or on the Hub, and what lies in them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from nopad.checkpoints.formats import Checkpoint, StoredTensor

logger = logging.getLogger(__name__)

SAFETENSORS = ("model.safetensors.index.json", "model.safetensors")
PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
META = "model.pth"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
FILES = (".safetensors", *PICKLE_SUFFIXES)


def open_checkpoint(name: str | Path, *, revision: str | None = None, **hub: Any) -> Checkpoint:
    """Open a checkpoint without loading it.

    Args:
        name: a folder, a single `.safetensors`, `.pth`, `.pt` or `.bin` file, which the JSON files beside it are part
            of, or a name on the Hugging Face Hub.
        revision: branch, tag or commit on the Hub.
        hub: `cache_dir`, `token`, `local_files_only`, `force_download`, `subfolder`, as transformers takes them.

    Raises:
        ValueError: no weights there, or files that hold something else.
        OSError: neither a file nor a folder, and the Hub does not have it or cannot be reached.
    """
    name = str(name)
    path = Path(name).expanduser()
    if revision is not None and path.exists():
        raise ValueError(f"revision: {name!r} is on this machine and has no revisions, got {revision!r}")
    if path.is_file():
        return _with_json(Checkpoint(name, _read_file(path)), partial(_find, str(path.parent)))
    local = path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.suffix in FILES
    if not path.is_dir() and local:
        raise OSError(f"checkpoint {name!r}: neither a file nor a folder, and no name on the Hub (owner/model)")
    unasked = None if path.is_dir() else _why_unasked(name, **hub)
    if unasked is not None:
        hub["local_files_only"] = True
    find = partial(_find, str(path) if path.is_dir() else name, revision=revision, **hub)
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(name, path if path.is_dir() else None, find, unasked):
        tensors |= _read_file(file)
    return _with_json(Checkpoint(name, tensors), find)


def _with_json(checkpoint: Checkpoint, find: Callable[[str], Path | None]) -> Checkpoint:
    """What stands beside the weights; of two files about pixels the one counts that transformers takes."""
    preprocessor = (_read_json(find("processor_config.json")) or {}).get("image_processor")
    if preprocessor is None:
        preprocessor = _read_json(find("preprocessor_config.json"))
    path = find("config.json")
    folder = None if path is None else path.parent
    return replace(checkpoint, config=_read_json(path) or {}, preprocessor=preprocessor, folder=folder)


def _find(name: str, filename: str, **hub: Any) -> Path | None:
    found = cached_file(name, filename, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


def _why_unasked(name: str, *, local_files_only: bool = False, **hub: Any) -> str | None:
    """Why the Hub is not to be asked for files, `None` where it answers, whatever that is.

    Where it cannot be reached huggingface_hub would ask again and again for each file, half a minute long.
    """
    if local_files_only or constants.HF_HUB_OFFLINE:
        return "as local_files_only or HF_HUB_OFFLINE says"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of a client that is another one in each version of huggingface_hub
        reason = f"which cannot be reached: {str(error) or repr(error)}"
        logger.warning("looking for %s in the Hub's cache alone, without the Hub, %s", name, reason)
        return reason
    return None


def _weight_files(
    name: str, folder: Path | None, find: Callable[[str], Path | None], unasked: str | None
) -> list[Path]:
    for index, single in (SAFETENSORS, PICKLES):
        if (path := find(index)) is not None:
            weight_map = (_read_json(path) or {}).get("weight_map")
            if not weight_map or not isinstance(weight_map, dict) or {type(f) for f in weight_map.values()} != {str}:
                raise ValueError(f"{path}: expected a weight_map of tensors and files, got {weight_map!r:.80}")
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
        where = "on the Hub" if unasked is None else f"in the Hub's cache, without the Hub, {unasked}"
        raise OSError(
            f"checkpoint {name!r}: neither a file nor a folder, and no weights of that name {where}; {expected}. "
            f"'untrained:{name}' gives a published architecture with random weights"
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
            pointer = path.read_bytes()[:64].startswith(b"version https://git-lfs")
            found = "a pointer of Git LFS; fetch the file itself with `git lfs pull`" if pointer else error
            raise ValueError(f"checkpoint file {str(path)!r}: expected safetensors, got {found}") from error
        tensors = {}
        for name in handle.keys():  # noqa: SIM118 - the handle is no dict
            part = handle.get_slice(name)
            dtype = handle.get_tensor(name).dtype
            tensors[name] = StoredTensor(tuple(part.get_shape()), dtype, lambda name=name: handle.get_tensor(name))
        return tensors
    if path.suffix not in PICKLE_SUFFIXES:
        raise ValueError(
            f"checkpoint file {str(path)!r}: expected .safetensors, .pth, .pt or .bin, got {path.suffix!r}"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # junk can raise anything
        raise ValueError(f"checkpoint file {str(path)!r}: expected tensors and nothing else, got {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = list(content)[:10] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"checkpoint file {str(path)!r}: expected a flat dict of tensors, got {keys}")
    return {name: StoredTensor(tuple(value.shape), value.dtype, lambda v=value: v) for name, value in content.items()}
