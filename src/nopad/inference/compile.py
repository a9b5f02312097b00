"""`PackedEncoder.compile`: finds the fastest way to run an encoder's layers on this machine, and warms it up."""

from __future__ import annotations

import importlib
import logging
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch

from nopad.counts import check_count
from nopad.inference.cuda_graphs import CUDAGraphLayers
from nopad.inference.defaults import default_capacity, default_max_segments
from nopad.inference.dispatch import is_dispatched
from nopad.inference.fusion import blocked
from nopad.inference.fusion import layers as fused
from nopad.inference.guards import ModuleGuard
from nopad.inference.layer_stack import CompiledLayers, EagerLayers, LayerStack
from nopad.inference.padding import pad_rows, pad_segments, poison_segments, round_up_max_seqlen
from nopad.inference.runner import DeferredRunner, Runner, StaticRunner
from nopad.kernels.attention import reads_host_lengths
from nopad.segments import Segments

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

logger = logging.getLogger(__name__)

MAX_GRAPH_CAPACITY = 49152
"""Largest capacity that is recorded as CUDA graphs; larger packs are not launch-bound (docs/tuning.md)."""
MIN_INPUTS_ON_CPU = 32
"""A job of fewer inputs does not compile on a CPU: laying out the weights would take longer than it saves."""
UNAVAILABLE_ERRORS = (
    RuntimeError,  # of torch's compilers and Triton, for example without a C++ compiler
    ValueError,  # sizes that a GEMM does not support
    ImportError,
    OSError,
    subprocess.SubprocessError,
)
"""Exceptions that mean: this way to run the layers is not available, try the next."""
ERRORS_OF_VERSIONS = (AssertionError, TypeError, AttributeError, LookupError)
"""Exceptions of other versions of quack, CUTLASS and Triton; elsewhere they are faults, and `compile` raises them."""


def compile_encoder(
    encoder: PackedEncoder, capacity: int | None = None, max_segments: int | None = None, *, compiled: bool = True
) -> None:
    """Compile the layers, one by one, for packs of a fixed shape; all warm-up is done here.

    From then on, every pack without gradients is padded to `capacity` rows. One graph serves all packs, and an image's
    features are bit-equal whatever it is packed with: on one kind of device, in one version, for one capacity. Packs
    that do not fit, training, and `output_hidden_states` run as before `compile`. Without Triton or a C++ compiler,
    packs are padded as well, and a warning is logged that the layers are not compiled. Threads and CUDA streams may
    share the encoder; its layers run one pack at a time.

    On a CPU, in float32 and bfloat16, nothing is compiled: layers run in blocks of rows over a copy of their weights,
    and packs are padded to the next block alone.

    Weights may change: copies of them are updated before the next pack. Two changes cannot be detected: a write through
    `.data`, and another `eps` of a norm. Layers with hooks, replaced parts, or dropout in training run eagerly, on
    `capacity` rows. On a GPU, a final LayerNorm `norm` may receive zero-mean tokens; LayerNorm is invariant to that. A
    copied or unpickled encoder is compiled for the same capacity when it is first used.

    Args:
        encoder: the encoder.
        capacity: tokens of a pack, prefix tokens included; see `default_capacity`: 16,896 on an H100, 2,048 on a CPU.
        max_segments: maximum number of segments of a pack: images, clips, or frames that do not attend to each other.
            `capacity // 64` by default, `capacity // 16` on a CPU.
        compiled: `False` pads packs and leaves the layers uncompiled.

    Raises:
        ValueError: a capacity that is too small for one token, or `max_segments` below 1.
    """
    encoder.uncompile()
    if capacity is None:
        capacity = default_capacity(encoder.device)
    check_count("capacity", capacity, encoder.num_prefix_tokens + 1)
    if max_segments is None:
        max_segments = default_max_segments(capacity, encoder.device)
    check_count("max_segments", max_segments)
    encoder._runner = _static_runner(encoder, capacity, max_segments, compiled)


def start_imports(device: torch.device) -> threading.Thread:
    """Begin to import what `compile` needs on a GPU, in a thread: quack takes seconds, while weights are read.

    What cannot be imported is left to `compile`, which imports it again and takes the next way to run the layers.
    """

    def start() -> None:
        with suppress(Exception):
            if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
                importlib.import_module("nopad.inference.fusion.gemm_quack")

    thread = threading.Thread(target=start, name="nopad-imports", daemon=True)
    thread.start()
    return thread


def needs_compiler(encoder: PackedEncoder) -> bool:
    """Whether `compile` uses a compiler, which not every machine has: on a CPU mostly not."""
    return blocked.unsupported_reason(encoder, encoder.device, encoder.dtype) is not None


def compiles_by_default(encoder: PackedEncoder, num_inputs: int) -> bool:
    """Whether a job compiles its encoder: on a GPU, and on a CPU where that takes no compiler and pays."""
    if encoder.device.type == "cpu":
        return num_inputs >= MIN_INPUTS_ON_CPU and not needs_compiler(encoder)
    return encoder.device.type == "cuda"


def fills_capacity(encoder: PackedEncoder) -> bool:
    """Whether every pack costs as much as one of `compiled_capacity` tokens."""
    runner = current_runner(encoder)
    return isinstance(runner, StaticRunner) and runner.stack.block_rows is None


def current_runner(encoder: PackedEncoder) -> Runner:
    """The encoder's runner; that of a copy is compiled first, for the capacity of the encoder that it is a copy of."""
    runner = encoder._runner
    if isinstance(runner, DeferredRunner):
        with runner.lock:
            if encoder._runner is runner:  # no other thread has been here
                encoder._runner = _static_runner(encoder, runner.capacity, runner.max_segments, runner.compiled)
    return encoder._runner


def _static_runner(encoder: PackedEncoder, capacity: int, max_segments: int, compiled: bool) -> StaticRunner:
    on_device = torch.cuda.device_of(next(encoder.parameters()))
    # Tensors made in inference mode could not be updated in place.
    with on_device, torch.inference_mode(False), torch.no_grad():
        layers = compile_layers(encoder, capacity, max_segments, compiled)
        return StaticRunner(encoder, capacity, max_segments, layers, compiled=compiled)


def compile_layers(encoder: PackedEncoder, capacity: int, max_segments: int, compiled: bool) -> LayerStack:
    """The fastest layer stack that is available here, warmed up for packs of this shape.

    Where layers cannot be compiled they run eagerly, and a warning gives the reason. On a GPU, packs of at most
    `MAX_GRAPH_CAPACITY` rows are recorded as CUDA graphs, unless the attention backend reads lengths on the host.
    """
    if not compiled:
        return EagerLayers(encoder.layers)
    if is_dispatched(encoder.layers):
        logger.warning("the layers run uncompiled: accelerate moves their inputs or weights for each call")
        return EagerLayers(encoder.layers)
    start = time.perf_counter()
    layers = _first_available(encoder, capacity, max_segments)
    if can_record(encoder.device, encoder.attention_backend, capacity):
        layers = CUDAGraphLayers(layers)
        warm_up(encoder, layers, capacity, max_segments)
    logger.info("compiled for packs of %d tokens in %.0f s", capacity, time.perf_counter() - start)
    return layers


def can_record(device: torch.device, attention: str, capacity: int) -> bool:
    """Whether to record layers as CUDA graphs; a replay would use the host lengths of the recorded pack."""
    return device.type == "cuda" and capacity <= MAX_GRAPH_CAPACITY and not reads_host_lengths(attention)


def _first_available(encoder: PackedEncoder, capacity: int, max_segments: int) -> LayerStack:
    message = ""
    for make, errors in _candidates(encoder):
        if message:
            logger.warning("the layers are not compiled in the fastest way: %s", message)
        try:
            layers = make()
            warm_up(encoder, layers, capacity, max_segments)
            if layers.execution != "eager":
                return layers
            message = "torch.compile is disabled or does not work here"
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except errors as error:
            message = f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]}"
            level = logging.WARNING if isinstance(error, ERRORS_OF_VERSIONS) else logging.DEBUG
            logger.log(level, "a way to run the layers is not available", exc_info=error)
    logger.warning("the layers run uncompiled: %s", message)
    return EagerLayers(encoder.layers)


def _candidates(
    encoder: PackedEncoder,
) -> Iterator[tuple[Callable[[], LayerStack], tuple[type[Exception], ...]]]:
    """Constructors of layer stacks, fastest first, and the exceptions that mean that one is not available."""
    reason = fused.unsupported_reason(encoder, encoder.device, encoder.dtype)
    if reason is None:
        backends, reason = fused.gemm_backends_for(encoder, encoder.device, encoder.dtype)
        rope, centre = encoder.example_rope(encoder.num_prefix_tokens + 1), not fused.keeps_mean(encoder)
        for make in backends:
            errors = (*UNAVAILABLE_ERRORS, *ERRORS_OF_VERSIONS)
            yield lambda make=make: fused.FusedLayers(encoder.layers, make(), rope, centre=centre), errors
    if encoder.device.type == "cpu" and reason is not None:
        reason = blocked.unsupported_reason(encoder, encoder.device, encoder.dtype)
        if reason is None:
            yield partial(blocked.BlockedLayers, encoder.layers), UNAVAILABLE_ERRORS
    if reason is not None:
        logger.info("layers are not compiled in the fastest way: %s", reason)
    yield partial(CompiledLayers, encoder.layers), UNAVAILABLE_ERRORS


@torch.no_grad()
def warm_up(encoder: PackedEncoder, layers: LayerStack, capacity: int, max_segments: int) -> None:
    """Run the layers, and the kernels around them, for every `max_seqlen` of a static pack; check fused layers.

    Layers in blocks run one block alone: their kernels depend on nothing else.
    """
    capacity = layers.padded_rows(1, capacity)
    encoder.example_positions()
    rope = encoder.example_rope(capacity)
    tokens = torch.randn(capacity, encoder.hidden_size, dtype=torch.float32, device=encoder.device).to(encoder.dtype)
    tokens, finite = pad_rows(tokens, capacity)
    poison_segments(tokens, finite, Segments.of([capacity], encoder.device))
    lengths = sorted({round_up_max_seqlen(1 << power, capacity) for power in range(capacity.bit_length() + 1)})
    foldable = isinstance(layers, fused.FusedLayers | blocked.BlockedLayers)
    if foldable and not ModuleGuard(encoder.layers).structure_changed():  # no user hooks
        layers.check(tokens, pad_segments(encoder.example_segments(lengths[0]), capacity, None), rope)
    for length in lengths:
        segments = pad_segments(encoder.example_segments(length), capacity, max_segments)
        with layers.exclusive():
            layers(tokens, segments, rope)
