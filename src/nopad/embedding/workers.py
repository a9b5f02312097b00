"""The encoder and the worker of a job, made by its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nopad.checkpoints.dialects import DIALECTS
from nopad.checkpoints.towers import open_tower
from nopad.embedding.job import make_reader
from nopad.embedding.settings import Settings
from nopad.encoder import PackedEncoder
from nopad.environment import device_name, dtype_name
from nopad.extras import install
from nopad.inference.compile import compiles_by_default, start_imports
from nopad.inference.defaults import default_dtype
from nopad.inference.fusion import layers as fused
from nopad.loading import load, processor
from nopad.pipeline.device_decode import start_engines
from nopad.pipeline.fit import fit_packs
from nopad.pipeline.processor import Processor, rule_for
from nopad.pipeline.worker import Worker
from nopad.published import UNTRAINED

# Time per pack of 16,896 tokens on an H200, AIMv2-L: `nopad bench untrained:apple/aimv2-large-patch14-native --capacity
# 16896`, eager, without and with quack.
_COMPILED_OVER_EAGER, _QUACK_OVER_TORCH = 0.7, 0.9


def check_features(model: object, settings: Settings) -> None:
    """Refuse settings by which a model gives no features, from its config, before sources are listed for minutes.

    Args:
        model: an encoder, or anything else where `settings.model` names it.
        settings: of the job.

    Raises:
        ValueError, OSError: see `Selection`, `nopad.processor` and `Preprocessing.with_size`.
    """
    selection = settings.selection
    sizes: dict[str, Any] = {"min_patches": settings.min_patches, "multiple_of": settings.multiple_of}
    if isinstance(model, PackedEncoder):
        selection.check(model)
        rule = rule_for(model, settings.size, max_patches=settings.max_patches, **sizes)
        Processor.of(model, preprocessing=rule)
        return
    sizes["max_patches"] = None if settings.max_patches == "auto" else settings.max_patches
    of_checkpoint: dict[str, Any] = {"revision": settings.revision, "prefix": settings.prefix, "dtype": torch.float32}
    processor(settings.model, size=settings.size or "model", **sizes, **of_checkpoint)


def load_encoder(settings: Settings) -> PackedEncoder:
    """The encoder of a job, on its device.

    Raises:
        ValueError: see `nopad.load`.
    """
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {"attention": settings.attention, "precision": settings.precision}
    options |= {"revision": settings.revision, "prefix": settings.prefix}
    if settings.compile is not False and settings.layers is None:
        start_imports(device)
    if settings.decode in ("auto", "gpu") and settings.resize == "torch":
        start_engines(device)
    return load(settings.model, device=device, dtype=_dtype(settings, device), **options)


def _dtype(settings: Settings, device: torch.device) -> torch.dtype | None:
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    if not settings.model.startswith(UNTRAINED):
        checkpoint = open_tower(settings.model, DIALECTS, settings.prefix, revision=settings.revision)
        if checkpoint.quantization_config is not None:
            return None
    return default_dtype(device)


def make_worker(
    settings: Settings,
    encoder: PackedEncoder,
    num_inputs: int,
    begun: Mapping[str, str] | None = None,
    *,
    is_loaded: bool = True,
    decodes: bool = True,
) -> Worker:
    """A worker that embeds by the settings of a job, its encoder compiled if it is to be.

    Args:
        num_inputs: of the job; for a few on a CPU, compiling takes longer than it saves.
        begun: the record of the job that was begun in this folder. What it was compiled for by default is the same
            now, and so are its capacity, for the requested one may have been halved then, and the CPU as its decoder.
        is_loaded: the encoder was loaded for this job. One that was given is compiled or not, as it is.
        decodes: this process decodes, not actors.

    Raises:
        ValueError: full packs do not fit into the memory of the device.
    """
    begun = begun or {}
    rule = rule_for(
        encoder,
        settings.size,
        min_patches=settings.min_patches,
        max_patches=settings.max_patches,
        multiple_of=settings.multiple_of,
    )
    options: dict[str, Any] = {"resize": settings.resize, "preprocessing": rule, "selection": settings.selection}
    limits: dict[str, Any] = {"timeout": settings.input_timeout, "memory": settings.decode_memory}
    begun_by_cpu = settings.decode == "auto" and begun and begun.get("decode", "cpu") == "cpu"
    limits["decode"] = "cpu" if begun_by_cpu else settings.decode
    worker = Worker(encoder, capacity=settings.capacity, threads=settings.workers, **options, **limits)
    if num_inputs and decodes:
        with make_reader(settings) as reader:
            worker.start_processes(reader.decoder)  # while the encoder is compiled
    if settings.compile and settings.layers is not None:
        raise ValueError("compile: layers run one by one where --layers are stored or pooled; leave one of them out")
    compiled = settings.compile
    if compiled is None:
        default = compiles_by_default(encoder, num_inputs)
        compiled = settings.layers is None and begun.get("compile", "yes" if default else "no") == "yes"
    halvings = {str(worker.capacity >> power) for power in range(worker.capacity.bit_length())}
    if (capacity := begun.get("capacity")) in halvings:
        worker.capacity = int(capacity)
    if not encoder.compiled_capacity:
        fit_packs(worker, compiled=compiled and is_loaded, may_halve=capacity is None)
    return worker


def describe_execution(worker: Worker) -> str:
    """How a job's encoder runs, and what would be faster."""
    encoder = worker.encoder
    how = encoder.execution if encoder.compiled_capacity else "not compiled"
    precision = f" and {encoder.precision}" if encoder.precision else ""
    line = (
        f"{encoder.family} in {dtype_name(encoder.dtype)}{precision} on {device_name(encoder.device)}, {how}, packs of "
        f"{worker.capacity:,} tokens"
    )
    if encoder.device.type != "cuda":
        return line
    if worker.decode == "gpu":
        line += ", JPEGs decoded by its engines"
    elif worker.gpu_unsupported_reason is not None:
        line += f"; JPEGs are decoded on the CPU: {worker.gpu_unsupported_reason}"
    return line + _faster_execution(encoder, how)


def _faster_execution(encoder: PackedEncoder, how: str) -> str:
    """What would make packs on a GPU faster, as the end of a line."""
    if how in ("not compiled", "eager"):
        return f"; compiled, a pack takes {_COMPILED_OVER_EAGER} times as long on an H200"
    needs = encoder, encoder.device, encoder.dtype
    takes_quack = fused.unsupported_reason(*needs) is None and fused.quack_unsupported_reason(*needs) is None
    lacks_quack = takes_quack and not fused.quack_is_installed()
    if how == "compiled" and encoder.precision == "fp8":
        if lacks_quack:
            return f"; with quack, float8 is fused: {install('hopper')}"
        return "; float8 is not fused for this model, and mostly no faster than bfloat16"
    if how == "fused by torch" and lacks_quack:
        return f"; with quack, a pack takes {_QUACK_OVER_TORCH} times as long: {install('hopper')}"
    return ""
