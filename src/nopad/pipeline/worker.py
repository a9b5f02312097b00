"""From images to features: decode threads, a packer, the encoder. The bulk job and `encoder.embed` both run it."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from nopad.environment import num_cores, quick_switches
from nopad.inference.defaults import default_capacity
from nopad.pipeline.decode_process import Decoder
from nopad.pipeline.device_decode import DeviceDecoder, as_jpeg, why_unavailable
from nopad.pipeline.groups import Group, Part, parts_of
from nopad.pipeline.image_processor import ImageProcessor, PreparedImage
from nopad.pipeline.isolation import DecodeProcesses
from nopad.pipeline.memory import MemoryBudget, MemoryReservation
from nopad.pipeline.normalize import Normalizer
from nopad.pipeline.pack_runner import MAX_RUNNING, EmbeddingResult, PackRunner, num_segments, num_tokens
from nopad.pipeline.packer import ENOUGH_CHOICE, BestFitPacker
from nopad.pipeline.preparers import InProcesses, InThreads
from nopad.pipeline.read_ahead import ReadAhead
from nopad.pipeline.selection import Selection
from nopad.pipeline.stats import Stats
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS
from nopad.preprocessing.rules import Preprocessing, Resize

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

Item = TypeVar("Item")

_DECODED = {
    "cpu": "",
    "gpu": "; JPEGs decoded and resized on the GPU",
    "scaled": "; JPEGs decoded at a half, quarter or eighth of their size where that is enough",
}

MIN_AHEAD, AHEAD_PER_THREAD = 32, 32
"""Images that are prepared ahead of the packer at most, `memory` permitting: the encoder's thread takes none while it
waits for a GPU, and the decode threads must have enough to do for the time of a pack."""


class Worker:
    """Embeds groups of images with one encoder.

    What a group's features are depends on its images and on the settings alone: packs never mix groups, and which
    images share a pack follows from their order, not from how fast they are decoded.

    Args:
        encoder: runs on its own device and in its own dtype.
        capacity: tokens of a pack, prefix tokens among them; a larger image goes alone. By default what the encoder is
            compiled for, else `default_capacity`.
        resize: as `PackedEncoder.pack` takes it.
        preprocessing: how images are made; the rule of the encoder by default.
        selection: the features to return; vectors alone by default.
        threads: number of threads that read and preprocess; one per core by default.
        timeout: seconds for one input that is decoded in a process of its own, `None` for no limit.
        memory: bytes that images may take between file and pack; by default half of what is free.
        decode: how JPEGs that come from processes are decoded: `"gpu"`, see `nopad.pipeline.device_decode`;
            `"auto"` for that where it is possible; `"scaled"` at a fraction of their size, see
            `nopad.preprocessing.jpegs.scaled_jpeg`.

    Attributes:
        decode: `"cpu"`, `"gpu"` or `"scaled"`.
        gpu_unsupported_reason: why `"auto"` is not `"gpu"`.

    Raises:
        ValueError: a number below 1, a rule that fits no image, an encoder in training mode, or `"gpu"` where JPEGs
            cannot be decoded on its device.
    """

    def __init__(
        self,
        encoder: PackedEncoder,
        *,
        capacity: int | None = None,
        resize: Resize = "torch",
        preprocessing: Preprocessing | None = None,
        selection: Selection | None = None,
        threads: int | None = None,
        timeout: float | None = INPUT_TIMEOUT_SECONDS,
        memory: int | None = None,
        decode: Literal["auto", "cpu", "gpu", "scaled"] = "cpu",
    ) -> None:
        self.threads = num_cores() if threads is None else threads
        if capacity is None:
            capacity = encoder.compiled_capacity or default_capacity(encoder.device)
        if capacity < 1 or self.threads < 1:
            raise ValueError(f"expected capacity ≥ 1 and threads ≥ 1, got {capacity} and {self.threads}")
        if encoder.training:
            raise ValueError(
                "encoder: expected in evaluation mode, got training mode, whose dropout makes features random; "
                "call its eval() first"
            )
        self.encoder = encoder
        self.capacity = capacity
        self.selection = selection or Selection()
        self.selection.check(encoder)
        self.image_processor = ImageProcessor.of(encoder, resize=resize, preprocessing=preprocessing)
        self.normalizer = Normalizer(self.image_processor.rule, encoder.patch_order, encoder.device, encoder.dtype)
        self.gpu_unsupported_reason = self._why_not_on_gpu() if decode in ("auto", "gpu") else None
        if decode == "gpu" and self.gpu_unsupported_reason is not None:
            raise ValueError(
                f"decode: expected 'auto', 'cpu' or 'scaled', got 'gpu', which does not work here: "
                f"{self.gpu_unsupported_reason}"
            )
        self.decode = decode if decode in ("cpu", "scaled") else "gpu" if self.gpu_unsupported_reason is None else "cpu"
        self._device_decoder = DeviceDecoder(self.image_processor, encoder.device) if self.decode == "gpu" else None
        self.stats = Stats()
        self.timeout = timeout
        self.memory = memory
        self._processes: DecodeProcesses | None = None

    @property
    def preprocessing(self) -> str:
        """How pixels are made, in words."""
        return self.image_processor.describe() + _DECODED[self.decode]

    def _why_not_on_gpu(self) -> str | None:
        if self.image_processor.resize != "torch":
            return f"resize={self.image_processor.resize!r} is bit-exact with Pillow, which the GPU is not"
        if self.image_processor.rule.rule == "navit":
            return "rule 'navit' adds pixels, which the GPU's resize does not"
        return why_unavailable(self.encoder.device)

    def warm_up(self) -> None:
        """Run as many full packs of large images as are ever on the device at once.

        Raises:
            torch.OutOfMemoryError: they do not fit.
        """
        side = math.isqrt(max(1, self.capacity - self.encoder.num_prefix_tokens)) * self.encoder.patch_size
        pixels = torch.zeros(3, side, side, dtype=torch.uint8)
        image = self.image_processor(pixels) if self.decode == "cpu" else as_jpeg(pixels, self.image_processor)
        number = max(1, self.capacity // num_tokens(self.encoder, image))
        pack = [(index, image) for index in range(min(number, self.encoder.compiled_max_segments or number))]
        runner = self.runner(Stats())
        for fetch in [runner.encode(pack) for _ in range(MAX_RUNNING)]:
            fetch()

    def runner(self, stats: Stats | None = None) -> PackRunner[Any]:
        """Runs packs of images that are prepared."""
        settings = self.normalizer, self.capacity, stats or self.stats, self.selection, self._device_decoder
        return PackRunner(self.encoder, *settings)

    def run(
        self, groups: Iterable[Iterable[Item]], read: Callable[[Item], Any], **options: Any
    ) -> Generator[list[EmbeddingResult], None, None]:
        """Embed group after group: `run_in_parts`, and for each group its images' results, in their order."""
        results: list[EmbeddingResult] = []
        with closing(self.run_in_parts(groups, read, **options)) as parts:
            for part in parts:
                results += part.results
                if part.is_last:
                    yield results
                    results = []

    def run_in_parts(
        self,
        groups: Iterable[Iterable[Item]],
        read: Callable[[Item], Any],
        *,
        decoder: Decoder | None = None,
        measure: Callable[[Item], tuple[int, int, int]] | None = None,
        strict: bool = False,
        stop: threading.Event | None = None,
        is_far: Callable[[], bool] = lambda: False,
    ) -> Generator[Part, None, None]:
        """Embed group after group; while one is encoded the next is already read, and on a GPU begun.

        Args:
            groups: taken one after another.
            read: runs in the decode threads, or with `decoder` in one thread that reads. Returns uint8 `(3, H, W)`, or
                `(frames, 3, H, W)` for a clip; with `decoder` what that takes, or that as `Unread`.
            decoder: decodes what `read` returns in processes, for files that are not trusted. The same one in each run.
            measure: as `Decoder.measure`, of an item before it is read, where there is no `decoder`; items do not count
                towards `memory` without it.
            strict: raise the error of the first image that cannot be used.
            stop: once set, the group in hand is finished and no other.
            is_far: see `ReadAhead`.

        Yields:
            Results in the order of the images, as soon as those before are there; of each group at least one part.

        Raises:
            ImageError: with `strict`.
            ProcessServerError: no process can be started.
        """
        switches = quick_switches() if self.encoder.device.type == "cuda" else nullcontext()
        with switches, self.read_ahead(groups, read, decoder=decoder, measure=measure, is_far=is_far) as ahead:
            yield from self._embed(ahead, strict=strict, stop=stop or threading.Event())

    def start_processes(self, decoder: Decoder) -> DecodeProcesses:
        """The processes that decode; the first call starts them, without waiting."""
        if self._processes is None:
            options: dict[str, Any] = {"max_processes": self.threads, "timeout": self.timeout}
            options |= {"keep_jpegs": self.decode == "gpu", "scale_jpegs": self.decode == "scaled"}
            self._processes = DecodeProcesses(decoder, self.image_processor, **options)
            self._processes.start()
        return self._processes

    def read_ahead(
        self,
        groups: Iterable[Iterable[Item]],
        read: Callable[[Item], Any],
        *,
        decoder: Decoder | None = None,
        measure: Callable[[Item], tuple[int, int, int]] | None = None,
        is_far: Callable[[], bool] = lambda: False,
    ) -> ReadAhead[Item]:
        """The images of groups as `run` has them, prepared ahead."""

        def in_thread(item: Item, reservation: MemoryReservation) -> PreparedImage:
            if measure is not None:
                reservation.reserve(self.image_processor.peak_bytes(*measure(item)))
            return self.image_processor(read(item))

        budget = MemoryBudget(self.memory)
        if decoder is None:
            preparer = InThreads(in_thread, self.threads)
        else:
            preparer = InProcesses(read, self.start_processes(decoder))
        return ReadAhead(groups, preparer, MIN_AHEAD + AHEAD_PER_THREAD * self.threads, budget, self.stats, is_far)

    def _embed(self, ahead: ReadAhead[Any], *, strict: bool, stop: threading.Event) -> Generator[Part, None, None]:
        """Packs of one group follow those of another without a pause."""
        encoder, groups = self.encoder, deque[Group]()
        runner: PackRunner[tuple[Group, int]] = self.runner()
        for outcomes in ahead.groups():
            group = Group()
            groups.append(group)
            packer: BestFitPacker[tuple[tuple[Group, int], PreparedImage]]
            choice = {"enough_choice": ENOUGH_CHOICE, "max_segments": encoder.compiled_max_segments}
            packer = BestFitPacker(self.capacity, **choice)
            for index, image in enumerate(outcomes):
                group.size += 1
                if isinstance(image, ImageError):
                    if strict:
                        raise ImageError(f"image {index}", image.reason) if image.source == "image" else image
                    self._store({(group, index): EmbeddingResult(error=image)})
                    yield from parts_of(groups)
                    continue
                tokens, segments = num_tokens(encoder, image), num_segments(encoder, image)
                for pack in packer.add(tokens, ((group, index), image), segments=segments):
                    self._store(runner.submit(pack))
                    yield from parts_of(groups)
            group.is_whole = True
            packs = list(packer.finish())
            for pack in packs:
                self._store(runner.submit(pack, is_last=pack is packs[-1]))
            if stop.is_set() or not ahead.is_ready:
                self._store(runner.finish())
            yield from parts_of(groups)
            if stop.is_set():
                return
        self._store(runner.finish())
        yield from parts_of(groups)

    def _store(self, results: Mapping[tuple[Group, int], EmbeddingResult]) -> None:
        for (group, index), result in results.items():
            group.results[index] = result
        self.stats.images += len(results)
        self.stats.failed += sum(result.error is not None for result in results.values())
