"""Where a checkpoint's files are, in a folder or on the Hub, and what lies in them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session
from transformers.utils.hub import cached_file

from nopad.checkpoints.contents import PICKLE_SUFFIXES, SUFFIXES, check_regular, read_json, read_tensors
from nopad.checkpoints.formats import Checkpoint, StoredTensor

logger = logging.getLogger(__name__)

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
META = "model.pth"


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
    if path.is_dir():
        find = partial(_in_folder, path / hub.get("subfolder", ""))
        return _with_json(Checkpoint(name, _weights(name, path / hub.get("subfolder", ""), find, None)), find)
    if os.path.lexists(path):
        return _with_json(Checkpoint(name, read_tensors(path)), partial(_in_folder, path.parent))
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.suffix in SUFFIXES:
        raise OSError(f"checkpoint {name!r}: neither a file nor a folder, and no name on the Hub (owner/model)")
    unasked = _why_unasked(name, **hub)
    if unasked is not None:
        hub["local_files_only"] = True
    find = partial(_on_hub, name, revision=revision, **hub)
    return _with_json(Checkpoint(name, _weights(name, None, find, unasked)), find)


def _with_json(checkpoint: Checkpoint, find: Callable[[str], Path | None]) -> Checkpoint:
    """What stands beside the weights; of two files about pixels the one counts that transformers takes."""
    preprocessor = _json(find("processor_config.json"), "image_processor").get("image_processor")
    if preprocessor is None:
        preprocessor = _json(find("preprocessor_config.json")) or None
    path = find("config.json")
    config = _json(path, "vision_config", "quantization_config")
    return replace(checkpoint, config=config, preprocessor=preprocessor, folder=None if path is None else path.parent)


def _json(path: Path | None, *objects: str) -> dict[str, Any]:
    """What a file says, nothing where there is none; each of `objects` is an object, or is left out."""
    content = {} if path is None else read_json(path)
    content = {key: value for key, value in content.items() if value is not None or key not in objects}
    for key in objects:
        if not isinstance(content.get(key, {}), dict):
            raise ValueError(f"{path}: {key}: expected a JSON object, got {content[key]!r:.80}")
    return content


def _in_folder(folder: Path, filename: str) -> Path | None:
    path = folder / filename
    if not os.path.lexists(path):
        return None
    check_regular(path)
    return path


def _on_hub(name: str, filename: str, **hub: Any) -> Path | None:
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


def _weights(
    name: str, folder: Path | None, find: Callable[[str], Path | None], unasked: str | None
) -> dict[str, StoredTensor]:
    """Every tensor, from the files that transformers would take, in its order of preference."""
    for single, index in (SAFETENSORS, PICKLES):
        if (path := find(single)) is not None:
            return read_tensors(path)
        if (path := find(index)) is not None:
            return _indexed(path, Path(single).suffix, find)
    if (path := find(META)) is not None:
        return read_tensors(path)
    if folder is not None:
        for suffixes in ((".safetensors",), PICKLE_SUFFIXES):
            files = sorted(file for file in folder.iterdir() if file.suffix in suffixes)
            if len(files) == 1:
                return read_tensors(files[0])
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


def _indexed(index: Path, suffix: str, find: Callable[[str], Path | None]) -> dict[str, StoredTensor]:
    """The tensors of the files that an index names, each in the file that `weight_map` gives for it and in no other.

    Raises:
        ValueError: no map of tensors to files beside the index, or files that hold something else than it says.
    """
    weight_map = read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or {type(file) for file in weight_map.values()} != {str}:
        raise ValueError(f"{index}: expected a weight_map of tensors and files, got {weight_map!r:.80}")
    shards = sorted(set(weight_map.values()))
    elsewhere = [file for file in shards if Path(file).suffix != suffix or set(file) & set("/\\\0")]
    if elsewhere:
        raise ValueError(f"{index}: expected names of {suffix} files beside it, got {elsewhere[:10]!r:.200}")
    found = {file: find(file) for file in shards}
    missing = [file for file, path in found.items() if path is None]
    if missing:
        raise ValueError(f"{index} names {len(missing)} files that are missing: {missing[:10]}")
    tensors: dict[str, StoredTensor] = {}
    for file, path in found.items():
        assert path is not None
        held, named = read_tensors(path), {name for name, shard in weight_map.items() if shard == file}
        if named - held.keys():
            raise ValueError(f"{index}: {file} lacks {len(named - held.keys())}: {sorted(named - held.keys())[:10]}")
        if held.keys() - named:
            others = {name: weight_map.get(name) for name in sorted(held.keys() - named)[:10]}
            raise ValueError(f"{index}: {file} holds tensors that the index has in another file or in none: {others}")
        tensors |= held
    return tensors
