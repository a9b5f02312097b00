"""`PackedEncoder.compile`: the fastest way in which an encoder's layers can be run here, found and warmed up."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from nopad.inference.cuda_graphs import Graphs
from nopad.inference.fusion import layers as fused
from nopad.inference.guards import Watch
from nopad.inference.padding import fill_up_rows, spoil
from nopad.inference.ready import CompiledLayers, PlainLayers, ReadyLayers
from nopad.inference.runner import StaticRunner, fill_up, longest
from nopad.kernels.attention import reads_host_lengths
from nopad.packing import CAPACITY
from nopad.segments import Segments

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

logger = logging.getLogger(__name__)

GRAPH_CAPACITY = 49152
"""Up to so many rows the host can be slower than the GPU, and a CUDA graph pays (docs/performance.md)."""
FAILURES = (
    RuntimeError,  # of torch's compilers and Triton, a missing C++ compiler among them
    ValueError,  # sizes that a product does not take
    AssertionError,  # the same, of CUTLASS
    TypeError,  # another version of quack
    AttributeError,
    LookupError,
    ImportError,
    OSError,
    subprocess.SubprocessError,
)
"""What making layers ready may raise where it cannot be done."""


def compile_encoder(
    encoder: PackedEncoder, capacity: int = CAPACITY, max_segments: int | None = None, *, compiled: bool = True
) -> None:
    """Compile the layers, one by one, for packs of one shape; all warm-up is done here.

    From then on inference fills each pack up to `capacity` rows. One graph serves every pack, and an image's
    features are the same bits whatever it is packed with, on one device kind, in one version, for one capacity.
    Packs that do not fit, training, and `output_hidden_states` run as before `compile`. Without Triton or a C++
    compiler packs are filled up as well, and a warning says that their layers are not compiled. Threads, and
    streams of a GPU, may share the encoder; its layers take one pack at a time.

    Weights may change: what was folded from them is folded anew. Two changes leave no trace and go unnoticed: a
    write through `.data`, and another `eps` of a norm. Layers that have hooks, other parts than before, or dropout
    in training run as they are, on `capacity` rows. On a GPU, where norms are LayerNorms, `norm` gets tokens less
    their mean, which it would take away itself.

    Args:
        capacity: tokens of a pack, prefix tokens among them.
        max_segments: maximum number of segments of a pack: images, clips, or frames that do not attend to each other.
            `capacity // 64` by default.
        compiled: `False` fills packs up and leaves the layers as they are.

    Raises:
        ValueError: a capacity that holds no image, or `max_segments` below 1.
    """
    encoder.uncompile()
    max_segments = max(1, capacity // 64) if max_segments is None else max_segments
    if capacity <= encoder.num_prefix_tokens or max_segments < 1:
        min_capacity = encoder.num_prefix_tokens + 1
        raise ValueError(f"expected capacity ≥ {min_capacity} and max_segments ≥ 1, got {capacity} and {max_segments}")
    on_device = torch.cuda.device_of(next(encoder.parameters()))
    with on_device, torch.inference_mode(False), torch.no_grad():  # or nothing made here could be written to later
        layers = compile_layers(encoder, capacity, max_segments, compiled)
        encoder._runner = StaticRunner(encoder, capacity, max_segments, layers)


def compile_layers(encoder: PackedEncoder, capacity: int, slots: int, compiled: bool) -> ReadyLayers:
    """The encoder's layers, compiled one by one, warm for packs of this shape.

    The layers of an encoder have one code, in float8 two, which is compiled once and serves them all. Where it cannot
    be compiled they run as they are, and a warning says why. On a GPU packs of at most `GRAPH_CAPACITY` rows are CUDA
    graphs, unless the attention goes by the host's lengths.
    """
    if not compiled:
        return PlainLayers(encoder.layers)
    start = time.perf_counter()
    layers = _first_that_works(encoder, capacity, slots)
    if recordable(encoder.device, encoder.attention, capacity):
        layers = Graphs(layers)
        warm_up(encoder, layers, capacity, slots)
    logger.info("compiled for packs of %d tokens in %.0f s", capacity, time.perf_counter() - start)
    return layers


def recordable(device: torch.device, attention: str, capacity: int) -> bool:
    """Whether layers become CUDA graphs: what goes by lengths on the host would replay those of the first pack."""
    return device.type == "cuda" and capacity <= GRAPH_CAPACITY and not reads_host_lengths(attention)


def _first_that_works(encoder: PackedEncoder, capacity: int, slots: int) -> ReadyLayers:
    message = ""
    for make in _makers(encoder):
        if message:
            logger.warning("the layers are compiled in another way than the fastest: %s", message)
        try:
            layers = make()
            warm_up(encoder, layers, capacity, slots)
            if layers.execution != "eager":
                return layers
            message = "torch.compile is disabled or does not work here"
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except FAILURES as error:
            message = (str(error).strip() or repr(error)).splitlines()[0]
    logger.warning("the layers run uncompiled: %s", message)
    return PlainLayers(encoder.layers)


def _makers(encoder: PackedEncoder) -> Iterator[Callable[[], ReadyLayers]]:
    """What can run the layers, fastest first."""
    reason = fused.obstacle(encoder, encoder.device, encoder.dtype)
    if reason is None:
        makers, reason = fused.products_for(encoder, encoder.device, encoder.dtype)
        rotation = encoder.example_rope(encoder.num_prefix_tokens + 1)
        for make in makers:
            yield lambda make=make: fused.FusedLayers(encoder.layers, make(), rotation)
    if reason is not None:
        logger.info("layers are not as fast as they could be: %s", reason)
    yield lambda: CompiledLayers(encoder.layers)


@torch.no_grad()
def warm_up(encoder: PackedEncoder, layers: ReadyLayers, capacity: int, slots: int) -> None:
    """Run all lengths of segments that make a graph of their own, and what stands around layers; check fused ones."""
    encoder.example_positions()
    rotation = encoder.example_rope(capacity)
    tokens = torch.randn(capacity, encoder.hidden_size, device=encoder.device).to(encoder.dtype)
    tokens, finite = fill_up_rows(tokens, capacity)
    spoil(tokens, finite, Segments.of([capacity], encoder.device))
    lengths = sorted({longest(1 << power, capacity) for power in range(capacity.bit_length())})
    if isinstance(layers, fused.FusedLayers) and not Watch(encoder.layers).rebuilt():  # nobody's hook sees it
        layers.check(tokens, fill_up(Segments.of(lengths[:1], encoder.device), capacity, None), rotation)
    for length in lengths:
        segments = fill_up(Segments.of([length], encoder.device), capacity, slots)
        layers(tokens, segments, rotation)
