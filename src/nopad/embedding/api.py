"""`nopad.embed`. What is heavy is imported when actors and decode processes are starting."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nopad.embedding.actors.starting import StartingActors
from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs.names import check_source
from nopad.embedding.progress import Progress
from nopad.embedding.settings import Settings
from nopad.pipeline import process_server
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS, MAX_PIXELS, NUM_FRAMES, MaxPatches
from nopad.preprocessing.rules import Resize
from nopad.preprocessing.size import Size

if TYPE_CHECKING:
    from nopad.embedding.summary import Summary
    from nopad.encoder import PackedEncoder


def embed(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    model: str | Path | PackedEncoder,
    revision: str | None = None,
    prefix: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    compile: bool | None = None,
    precision: str | None = None,
    attention: str = "auto",
    tokens: bool = False,
    layers: Sequence[int] | None = None,
    pool: str = "model",
    tokens_pool: int = 1,
    size: Size | None = None,
    min_patches: int | None = None,
    max_patches: MaxPatches = "auto",
    multiple_of: int | None = None,
    resize: Resize = "torch",
    decode: str = "auto",
    capacity: int | None = None,
    frames: int = NUM_FRAMES,
    fps: float | None = None,
    every: float | None = None,
    max_pixels: int = MAX_PIXELS,
    embedding_dtype: str = "float32",
    embedding_list: str = "fixed",
    shard_size: int | tuple[int, int] | None = None,
    input_timeout: float | None = INPUT_TIMEOUT_SECONDS,
    unreachable_rows: bool = False,
    decode_memory: int | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
    keep: str | None = None,
    thumbnails: int | None = None,
    exif: bool = False,
    hidden: bool = False,
    allow_outside_paths: bool = False,
    workers: int | None = None,
    update: bool = False,
    content_hash: bool = False,
    retry_failed: bool = False,
    actors: int | tuple[int, int] | None = None,
    part: tuple[int, int] | None = None,
    ray: str | None = None,
    stall: float | None = 600.0,
    stop: threading.Event | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Embed images and videos into a folder of Parquet shards, one row per input, failed ones too.

    Called again with the same arguments, it goes on where it was stopped or killed, and gives what an uninterrupted run
    would have given. A slash at the end of a path, `.` and `..` in it do not make it another argument.

    Args:
        sources: see `nopad.embedding.inputs.sources.list_inputs`.
        out: the folder of the table, or its address in a store (`s3://bucket/table`); read it with
            `nopad.read_features`.
        model: as `nopad.load` takes it, or an encoder.
        revision, prefix, attention: as `nopad.load` takes them.
        device: `"cuda"` where there is one, unless given.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: bfloat16 on a GPU that has it, else float32, and the
            checkpoint's own where its weights are quantised.
        compile: compile the model for full packs; unless given on a GPU, and on a CPU for at least 32 inputs where
            that takes no compiler.
        precision: `"fp8"` or `"int8"` as `nopad.load` takes it, or the checkpoint's own.
        tokens: store each image's tokens, too, in float16.
        layers: whose tokens are stored, and by which `pool` makes embeddings, from 0 or from the end; the last one
            unless given. The final norm is applied to all.
        pool: what an embedding is: `"model"` the model's own vector, whatever the layers; `"cls"` the CLS token,
            `"mean"` the mean of the patches, `"cls+mean"` both, of each layer, one behind the other.
        tokens_pool: store the mean of each square of so many by so many tokens.
        size, min_patches, multiple_of: as `PackedEncoder.pack` takes them, of images and of a video's frames.
        max_patches: maximum patches of an image, its aspect ratio kept: `"auto"` is 4,096 where the rule has no limit,
            so that one photo does not hold up a job; `None` is no limit but the rule's own.
        resize: as `PackedEncoder.pack` takes it.
        decode: of JPEGs: `"gpu"` by the engines of a GPU, at most a grey level from the CPU's pixels, which needs the
            extra `gpu-decode`; `"auto"` is `"gpu"` where that is possible, which the job's record has; `"scaled"` on
            the CPU at a half, quarter or eighth of their size where the model's is smaller: faster, other pixels.
        capacity: tokens of a pack; by the device unless given, 16,896 on an H100, 2,048 on a CPU. One that does not fit
            into a GPU's memory is halved until it does, which the job's record has.
        frames: frames of a video, spread evenly over it.
        fps: rows of a video for each second, each of the frame that is shown then; a video is one row unless given.
        every: seconds of a video for each row, with `frames` frames of them.
        max_pixels: images of more are failures.
        embedding_dtype: `"float32"` or `"float16"`, in the table.
        embedding_list: `"fixed"`, or `"variable"` for databases that cannot read lists of fixed size.
        shard_size: rows of a shard at most; or two numbers, as (1000, 5000): tars and row groups of Parquet files are
            joined until there are 1000 rows, and one that makes them more than 5000 is divided into shards of at most
            1000. Unless given it is (2048, 20480), doubled until 2,000 shards are enough or it is 32,768, and on
            until 10,000 are or it is 131,072; 512 with tokens; and shards of large images end after 1 to 10 GiB of the
            sources. A job that was begun keeps its own. If given, all tars are listed by their headers; so they are
            with `tokens` or `content_hash`, else those of 8 MiB to 2 GiB are one input each.
        input_timeout: seconds that decoding one input, listing a table, or reading a part of it, may take, in a process
            of its own; `None` is no limit.
        unreachable_rows: an input that cannot be reached, since a disk, mount or server fails again and again, becomes
            a failed row; by default its shard is not made, the summary has it in `unmade`, and the next call makes it.
        decode_memory: bytes for images that are decoded and read ahead; half of what is free unless given. One that
            needs more is a failure.
        image_column: the column of image bytes in Parquet files and datasets, where it is not clear.
        id_column: the column of names for the rows of Parquet files and datasets; by default their numbers.
        keep: columns of Parquet files and datasets to keep in the table, names with commas between or `"all"`; of
            WebDataset samples fields of their JSON, or `txt`, `json` and `cls` as a whole.
        thumbnails: store a JPEG of each image, of at most so many pixels a side, 16 to 512; of a video that of the
            frame in the middle.
        exif: store when and where photos were taken, by their EXIF: columns `taken`, by the camera's clock, `latitude`
            and `longitude`.
        hidden: take what is hidden or left by systems (`._*`, `.thumbnails`, `@eaDir`, …), too.
        allow_outside_paths: read files that a table names by path wherever they are, not below its folder alone.
        workers: decode threads, one per core unless given.
        update: take into the table what is new in the sources, and mark what is gone or has changed; rows that are not
            concerned stay as they are. `sources` may be others than the table's own.
        content_hash: read every input once more, so that `update` recognises it by its contents; by default size and
            time decide.
        retry_failed: try failed rows of finished shards again.
        actors: make shards by so many processes of this machine, on GPUs one each, or by as many actors of a Ray
            cluster; in this process unless given. As `(2, 8)` by 2 to 8 of them, as there is room.
        part: make one part of the shards, `(0, 8)` to `(7, 8)`, beside other calls that make the others, in whatever
            order, at the same time or not; by one actor unless `actors` are given.
        ray: the cluster of the actors: `"host:port"`, `"auto"` for the one that was started on this machine with
            `ray start`, `"local"` for one of its own; `RAY_ADDRESS` unless given, or the one that this process is
            connected to.
        stall: seconds without progress after which an actor is ended and its shard is made elsewhere; `None` is no
            limit.
        stop: once set, the shard in hand is finished and no other, and listing ends.
        progress: called with how far the run is, a few times a second, from another thread.

    Raises:
        ValueError: a source, setting or checkpoint that is wrong, or a folder with a job of other settings.
        OSError: a folder that cannot be written, or that another job writes to.
        UnreachableStoreError: the table's store cannot be reached, whatever was tried; finished shards are kept.
        InterruptedError: `stop` was set while the sources were listed.
        ImportError: a source or `actors` needs a package that is not installed.
    """
    return embed_by(locals())


def embed_by(arguments: Mapping[str, Any], imports: Callable[[], None] = lambda: None) -> Summary:
    """`embed`.

    Args:
        arguments: all of its, by name.
        imports: called once other processes are starting, before anything of transformers is imported.

    Raises:
        See `embed`.
    """
    model, layers, stop = arguments["model"], arguments["layers"], arguments["stop"]
    folder = JobFolder(arguments["out"])
    label, names = folder.spelling(_label(model), _paths(arguments["sources"]))
    layers = tuple(layers) if isinstance(layers, list | range) else layers
    settings = Settings.of({**arguments, "model": label, "layers": layers})
    encoder = None if isinstance(model, str | os.PathLike) else model
    if encoder is not None:
        _check_of_encoder(settings)
    if not isinstance(stop, threading.Event | None):
        raise ValueError(f"stop: expected a threading.Event, got {stop!r}")
    stop = stop or threading.Event()
    with ExitStack() as ends:
        starting = None
        if settings.in_process:
            process_server.start()  # it imports torch while this process imports transformers and lists the sources
        else:
            starting = ends.enter_context(closing(StartingActors(settings, stop)))
        imports()
        from nopad.embedding.table_run import TableRun
        from nopad.embedding.workers import check_features

        check_features(model, settings)
        return TableRun(folder, names, settings, encoder, starting, stop, arguments["progress"])()


def _check_of_encoder(settings: Settings) -> None:
    """Raise `ValueError` for options that an encoder in memory decides itself."""
    of_encoder = (settings.device, settings.revision, settings.prefix, settings.precision, settings.compile)
    is_default = settings.dtype == settings.attention == "auto" and all(option is None for option in of_encoder)
    if not (is_default and settings.in_process):
        raise ValueError(
            "model: an encoder brings its own device, dtype, precision, revision, prefix and attention, is compiled "
            "already or not, and cannot be sent to actors; give its name or path instead"
        )


def _paths(sources: str | Path | Sequence[str | Path]) -> list[str]:
    """The sources as they were spelt.

    Raises:
        ValueError: an address, or something else than a path.
    """
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    for source in sources:
        if not isinstance(source, str | os.PathLike):
            what = f"expected paths, got {type(source).__name__}"
            raise ValueError(f"sources: {what}; images in memory go through nopad.load(model).embed(images)")
        check_source("sources", source)
    return [os.fspath(source) for source in sources]


def _label(model: object) -> str:
    """A model's name, for the record of the job; a path is absolute, so that it holds in other folders as well.

    Raises:
        ValueError: neither an encoder nor a name.
    """
    if isinstance(model, str | os.PathLike):
        return _absolute(str(model))
    from torch import nn

    from nopad.encoder import PackedEncoder

    if isinstance(model, PackedEncoder):
        return _absolute(model.source) if model.source else type(model).__name__
    advice = ""
    if isinstance(model, nn.Module) and any(isinstance(module, PackedEncoder) for module in model.modules()):
        advice = "; give the encoder that it holds, of a PEFT model what merge_and_unload() returns"
    raise ValueError(f"model: expected an encoder of nopad, a name or a path, got {type(model).__name__}{advice}")


def _absolute(name: str) -> str:
    return str(Path(name).absolute()) if os.path.exists(name) else name
