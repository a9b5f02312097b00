"""`open_checkpoint`: finds the files of a checkpoint, in a folder or on the Hub, and reads their headers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nopad.checkpoints import mistral_params, open_clip_config, timm_config
from nopad.checkpoints.contents import PICKLE_SUFFIXES, SUFFIXES, read_tensors
from nopad.checkpoints.formats import Checkpoint
from nopad.checkpoints.hub import advice, file_on_hub, published_names, why_offline
from nopad.checkpoints.stored_tensor import StoredTensor
from nopad.counts import are, counted
from nopad.json_files import read_json
from nopad.local_paths import check_regular
from nopad.suggestions import did_you_mean

logger = logging.getLogger(__name__)

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
META = "model.pth"
PREPROCESSOR_CONFIG = "preprocessor_config.json"
PROJECTION, PROJECTION_FILE = "visual_projection.weight", "visual_projection.safetensors"
"""A tensor that the original vision class does not have, and the file in which `save_pretrained` writes it."""


def checkpoint_name(checkpoint: object) -> str:
    """A checkpoint's name or path as text.

    Raises:
        ValueError: something else, such as a model in memory.
    """
    if not isinstance(checkpoint, str | os.PathLike):
        raise ValueError(f"checkpoint: expected a name or a path, got {type(checkpoint).__name__}")
    if not os.fspath(checkpoint):
        raise ValueError("checkpoint: expected a name or a path, got ''; '.' is the current folder")
    return str(checkpoint)


def open_checkpoint(
    name: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    prefix_of: Callable[[Iterable[str], dict[str, Any]], str] | None = None,
    **hub: Any,
) -> Checkpoint:
    """Open a checkpoint without loading it.

    Args:
        name: a folder, a single `.safetensors`, `.pth`, `.pt` or `.bin` file, which the JSON files beside it are part
            of, or a name on the Hugging Face Hub.
        revision: branch, tag or commit on the Hub.
        subfolder: of the folder or of the repository.
        variant: part of the file's name, as in `model.fp16.safetensors`.
        use_safetensors: `True` for safetensors alone, `False` for pickles alone.
        prefix_of: returns the prefix of the tensors that are read, from the names in an index and `config.json`; of
            several files those without such tensors are not opened.
        hub: `cache_dir`, `token`, `local_files_only`, `force_download`, `proxies`, as transformers takes them.

    Raises:
        ValueError: no weights there, or files that hold something else.
        OSError: neither a file nor a folder, and the Hub does not have it or cannot be reached.
    """
    name = checkpoint_name(name)
    options = {"revision": revision, "subfolder": subfolder, "variant": variant, "use_safetensors": use_safetensors}
    again = {key: value for key, value in {**options, **hub}.items() if value is not None}
    if isinstance(hub.get("token"), str):
        again["token"] = _Token(hub["token"])
    return replace(_open(name, prefix_of, **options, **hub), opened_with=again)


class _Token(str):
    """A token of the Hub that is neither printed nor pickled."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'…'"

    def __deepcopy__(self, memo: dict[int, Any]) -> _Token:
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _open(
    name: str,
    prefix_of: Callable[[Iterable[str], dict[str, Any]], str] | None,
    *,
    revision: str | None,
    subfolder: str | None,
    variant: str | None,
    use_safetensors: bool | None,
    **hub: Any,
) -> Checkpoint:
    path = Path(name).expanduser()
    if revision is not None and path.exists():
        raise ValueError(f"revision: {name!r} is on this machine and has no revisions, got {revision!r}")
    choice = {"variant": variant, "use_safetensors": use_safetensors}
    if path.is_dir():
        folder = path / (subfolder or "")
        find = partial(_in_folder, folder)
        tensors = _weights(name, folder, find, None, prefix_of, **choice)
        return _with_json(Checkpoint(name, tensors, choice=choice), find)
    if os.path.lexists(path):
        requested = {option: value for option, value in {"subfolder": subfolder, **choice}.items() if value is not None}
        if requested:
            raise ValueError(f"checkpoint {name!r}: expected a folder or a Hub name with {requested}, got a file")
        return _with_json(Checkpoint(name, read_tensors(path)), partial(_in_folder, path.parent))
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.suffix in SUFFIXES:
        raise OSError(
            f"checkpoint {name!r}: neither a file nor a folder, and no name on the Hub (owner/model)"
            f"{did_you_mean(name, published_names())}"
        )
    offline_reason = why_offline(name, **hub)
    if offline_reason is not None:
        hub["local_files_only"] = True
    find = partial(file_on_hub, name, revision=revision, subfolder=subfolder or "", **hub)
    tensors = _weights(name, None, find, offline_reason, prefix_of, **choice)
    return _with_json(Checkpoint(name, tensors, choice=choice), find)


def _with_json(checkpoint: Checkpoint, find: Callable[[str], Path | None]) -> Checkpoint:
    """Add the JSON files beside the weights; of two preprocessor configs, the one that transformers reads."""
    preprocessor = _json(find("processor_config.json"), "image_processor").get("image_processor")
    if preprocessor is None:
        preprocessor = _json(find(PREPROCESSOR_CONFIG)) or None
    path = find("config.json")
    if path is None or open_clip_config.is_open_clip(checkpoint.tensors):  # others may lie there in two layouts
        path = find(open_clip_config.OPEN_CLIP_CONFIG) or path
    config = _json(path, "vision_config", "quantization_config")
    if path is None:
        config = mistral_params.as_config(_json(find(mistral_params.PARAMS)))
    if config.get("transformers_weights") not in (None, SAFETENSORS[0]):
        named = config["transformers_weights"]
        raise ValueError(
            f"{path}: transformers_weights: expected {SAFETENSORS[0]}, got {named!r:.80}; name the file itself"
        )
    if preprocessor is None:
        preprocessor = timm_config.preprocessor_of(config) or open_clip_config.preprocessor_of(config)
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **_projection(find(PROJECTION_FILE), checkpoint)},
        config=config,
        preprocessor=preprocessor,
        folder=None if path is None else path.parent,
    )


def _projection(path: Path | None, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    tensors = {} if path is None else read_tensors(path)
    if path is not None and (tensors.keys() != {PROJECTION} or PROJECTION in checkpoint.tensors):
        raise ValueError(
            f"checkpoint file {str(path)!r}: expected {PROJECTION!r} alone, which no other file has, got "
            f"{sorted(tensors)[:10]}"
        )
    return tensors


def _json(path: Path | None, *objects: str) -> dict[str, Any]:
    """The JSON object in a file, `{}` without one; the fields `objects` are objects or absent, model types names."""
    content = {} if path is None else read_json(path)
    content = {key: value for key, value in content.items() if value is not None or key not in objects}
    for key in objects:
        if not isinstance(content.get(key, {}), dict):
            raise ValueError(f"{path}: {key}: expected a JSON object, got {content[key]!r:.80}")
    for fields in (content, *(content.get(key) or {} for key in objects)):
        model_type = fields.get("model_type")
        if not isinstance(model_type, str | None):
            raise ValueError(f"{path}: model_type: expected a name, got {model_type!r:.80}")
    return content


def _in_folder(folder: Path, filename: str) -> Path | None:
    path = folder / filename
    if not os.path.lexists(path):
        return None
    check_regular(path)
    return path


def _weights(
    name: str,
    folder: Path | None,
    find: Callable[[str], Path | None],
    offline_reason: str | None,
    prefix_of: Callable[[Iterable[str], dict[str, Any]], str] | None,
    *,
    variant: str | None,
    use_safetensors: bool | None,
) -> dict[str, StoredTensor]:
    """Every tensor, from the files that transformers would take, in its order of preference."""
    kinds = [kind for kind in (SAFETENSORS, PICKLES) if use_safetensors in (None, kind is SAFETENSORS)]
    expected = [tuple(_of_variant(file, variant) for file in kind) for kind in kinds]
    if variant is None and SAFETENSORS in kinds:
        expected.append(mistral_params.WEIGHTS)
    for single, index in expected:
        if (path := find(single)) is not None:
            return read_tensors(path)
        if (path := find(index)) is not None:
            return _indexed(path, Path(single).suffix, find, prefix_of)
    if variant is None:
        named = [META, *open_clip_config.OPEN_CLIP_WEIGHTS]
        if folder is None:
            named.append(f"{name.rpartition('/')[2]}.pt")  # Perception Encoder's
        for file in named if PICKLES in kinds else named[1:2]:
            if (path := find(file)) is not None:
                return read_tensors(path)
        for kind in kinds:
            path = _only_file(name, folder, PICKLE_SUFFIXES if kind is PICKLES else (".safetensors",))
            if path is not None:
                return read_tensors(path)
    names = ", ".join(file for kind in expected for file in kind)
    if folder is not None:
        others = (
            "" if variant is not None else f", or one {' or '.join(f'*{Path(kind[0]).suffix}' for kind in kinds)} file"
        )
        raise ValueError(f"checkpoint {name!r}: no weights there; expected one of {names}{others}")
    where = "on the Hub" if offline_reason is None else f"in the Hub's cache, without the Hub, {offline_reason}"
    raise OSError(
        f"checkpoint {name!r}: neither a file nor a folder, and no weights of that name {where}; expected one of "
        f"{names}{advice(name)}"
    )


def _of_variant(file: str, variant: str | None) -> str:
    stem, _, suffix = file.rpartition(".")
    return file if variant is None else f"{stem}.{variant}.{suffix}"


def _only_file(name: str, folder: Path | None, suffixes: tuple[str, ...]) -> Path | None:
    files = [] if folder is None else sorted(file for file in folder.iterdir() if file.suffix in suffixes)
    if len(files) > 1:
        raise ValueError(
            f"checkpoint {name!r}: expected one weights file or an index, got {[file.name for file in files]}; "
            f"name the file itself"
        )
    return files[0] if files else None


def _indexed(
    index: Path,
    suffix: str,
    find: Callable[[str], Path | None],
    prefix_of: Callable[[Iterable[str], dict[str, Any]], str] | None,
) -> dict[str, StoredTensor]:
    """The tensors of the files that an index names, each in the file that `weight_map` gives for it and in no other.

    Raises:
        ValueError: no map of tensors to files beside the index, or files with other tensors than it lists.
    """
    weight_map = read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or {type(file) for file in weight_map.values()} != {str}:
        raise ValueError(f"{index}: expected a weight_map of tensors and files, got {weight_map!r:.80}")
    prefix = "" if prefix_of is None else prefix_of(weight_map, _json(find("config.json")))
    shards = sorted({file for name, file in weight_map.items() if name.startswith(prefix)})
    elsewhere = [file for file in shards if Path(file).suffix != suffix or set(file) & set("/\\\0")]
    if elsewhere:
        raise ValueError(f"{index}: expected names of {suffix} files beside it, got {elsewhere[:10]!r:.200}")
    paths = {file: find(file) for file in shards}
    missing = [file for file, path in paths.items() if path is None]
    if missing:
        raise ValueError(
            f"{index}: {counted(len(missing), 'file')} that it names {are(len(missing))} missing: {missing[:10]}"
        )
    tensors: dict[str, StoredTensor] = {}
    for file, path in paths.items():
        assert path is not None
        stored, indexed = read_tensors(path), {name for name, shard in weight_map.items() if shard == file}
        if indexed - stored.keys():
            raise ValueError(
                f"{index}: {file} lacks {len(indexed - stored.keys())}: {sorted(indexed - stored.keys())[:10]}"
            )
        if stored.keys() - indexed:
            others = {name: weight_map.get(name) for name in sorted(stored.keys() - indexed)[:10]}
            raise ValueError(f"{index}: {file} holds tensors that the index has in another file or in none: {others}")
        tensors |= stored
    return tensors
