"""The options of a job. Each one's name, default, help and check are here alone.

The arguments of `nopad embed`, the check of `nopad.embed` and the record of a job are made from the fields of
`Settings`. Nothing heavy is imported here, so that the command line can read it before its first line of output.
"""

from __future__ import annotations

from argparse import BooleanOptionalAction
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from nopad.embedding import options
from nopad.embedding.shard_sizes import (
    MAX_BYTES,
    MIN_BYTES,
    SHARD_SIZE,
    SHARD_SIZE_WITH_TOKENS,
    UNIT_FACTOR,
    ShardSize,
    default_shard_size,
    row_limits,
)
from nopad.preprocessing.limits import (
    INPUT_TIMEOUT_SECONDS,
    MAX_PATCHES,
    MAX_PIXELS,
    NUM_FRAMES,
    THUMBNAIL_SIDES,
    MaxPatches,
)
from nopad.preprocessing.size import Size

if TYPE_CHECKING:
    from nopad.pipeline.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a job beside its sources and its folder.

    Raises:
        ValueError: an option of another type or out of its range.
    """

    model: str = options.text(MISSING, "Hub name, folder, weights file, or untrained:<published name>")
    revision: str | None = options.text(None, "branch, tag or commit on the Hub")
    prefix: str | None = options.text(
        None, "of the vision tower's tensors in the checkpoint of a larger model (default: searched)"
    )
    tokens: bool = options.flag("store each image's tokens, too, in float16")
    layers: tuple[int, ...] | None = options.layers(
        "whose tokens are stored, and of which --pool makes embeddings, as -4,-1: from 0, or from the end (default: "
        "the last one)"
    )
    pool: str = options.choice(
        "model",
        ("model", "cls", "mean", "cls+mean"),
        "what an embedding is: the model's own vector, the CLS token, the mean of the patches, or both of these",
    )
    tokens_pool: int = options.count(1, "store the mean of each square of N × N tokens")
    size: Size | None = options.size(  # noqa: RUF009 - a field
        "of images: model (its own rule, the default), native (as they are), pixels of the short side with the "
        "aspect ratio kept, or HEIGHTxWIDTH"
    )
    min_patches: int | None = options.count(
        None, "minimum patches of an image, which is scaled up in its aspect ratio; for --size native or pixels"
    )
    multiple_of: int | None = options.count(None, "rows and columns of patches are multiples of this")
    max_patches: MaxPatches = options.max_patches(  # noqa: RUF009 - a field
        "maximum patches of an image, aspect ratio kept; not for images of one fixed size; none is no limit but the "
        f"model's own, auto is {MAX_PATCHES} where it has none"
    )
    device: str | None = options.device("cpu, cuda, cuda:1, …; cuda where there is one, unless given")
    dtype: str = options.choice(
        "auto",
        ("auto", "float32", "bfloat16", "float16"),
        "of the model; auto is bfloat16 on a GPU that has it, else float32, and as it is where weights are quantised",
    )
    compile: bool | None = options.option(
        None,
        "compile the model for full packs (default: on a GPU, and on a CPU for 32 inputs or more)",
        options.check_flag,
        recorded=True,
        action=BooleanOptionalAction,
    )
    precision: str | None = options.choice(
        None, ("fp8", "int8"), "of the layers' weights and GEMMs: fp8 for GPUs that have it, int8 for a CPU"
    )
    attention: str = options.text("auto", "kernel of the attention")
    workers: int | None = options.count(None, "threads that decode (default: one per core)", recorded=False)
    capacity: int | None = options.count(
        None, "tokens per pack (default: by the device, 16896 on an H100, 2048 on a CPU)"
    )
    resize: str = options.choice(
        "torch", ("torch", "pil"), "torch is fast, pil bit-exact with transformers' processors"
    )
    decode: str = options.choice(
        "auto",
        ("auto", "cpu", "gpu", "scaled"),
        "of JPEGs: gpu by the engines of a GPU, at most a grey level from the CPU's pixels, which needs the extra "
        "gpu-decode; auto is gpu where that is possible, else cpu; scaled on the CPU at a half, quarter or eighth of "
        "their size where the model's is smaller: faster, other pixels",
    )
    frames: int = options.count(NUM_FRAMES, "frames of a video, spread evenly over it")
    fps: float | None = options.rate(
        "rows of a video for each second, each of one frame; a video is one row unless given"
    )
    every: float | None = options.duration(
        "seconds of a video for each row, as 2s, 500ms or 1m, with --frames frames of them"
    )
    max_pixels: int = options.count(MAX_PIXELS, "images of more pixels are failures")
    input_timeout: float | None = options.time_limit(
        INPUT_TIMEOUT_SECONDS, "seconds that decoding one input, or listing one table, may take, none for no limit"
    )
    unreachable_rows: bool = options.flag(
        "what cannot be reached, since a disk, mount or server fails again and again, becomes a failed row; unless "
        "given, its shard is left to the next run",
        recorded=False,
    )
    decode_memory: int | None = options.memory(
        "memory for images that are decoded and read ahead, as 4GB or in bytes (default: half of what is free)"
    )
    image_column: str | None = options.text(
        None,
        "column of image bytes in Parquet files and datasets, where it is not clear",
        recorded=False,  # the list of inputs holds it
        metavar="NAME",
    )
    id_column: str | None = options.text(
        None,
        "column of names for the rows of Parquet files and datasets (default: their numbers)",
        recorded=False,  # the list of inputs holds it
        metavar="NAME",
    )
    keep: str | None = options.text(
        None,
        "columns of Parquet files and datasets, fields of WebDataset samples' JSON, to keep: label,caption or all",
        metavar="NAMES",
    )
    thumbnails: int | None = options.thumbnails(
        "store a JPEG of each image, of at most N pixels a side, {} to {}".format(*THUMBNAIL_SIDES)
    )
    exif: bool = options.flag(
        "store when and where photos were taken, by their EXIF: columns taken, latitude, longitude"
    )
    hidden: bool = options.flag(
        "take what is hidden or left by systems, too (._*, .thumbnails, @eaDir, …)",
        recorded=False,  # the list of inputs holds it
    )
    allow_outside_paths: bool = options.flag(
        "read files that a table names by path wherever they are, not below its folder alone", recorded=False
    )
    embedding_dtype: str = options.choice("float32", ("float32", "float16"), "of the embedding in the table")
    embedding_list: str = options.choice(
        "fixed",
        ("fixed", "variable"),
        "fixed-size lists, or variable ones for databases that cannot read those",
    )
    shard_size: ShardSize | None = options.shard_size(  # noqa: RUF009 - a field
        "rows of a shard at most; as 1000..5000 tars and row groups of Parquet files are joined up to 1,000 rows, and "
        f"divided above 5,000 (default: {SHARD_SIZE}..{UNIT_FACTOR * SHARD_SIZE}, more for many inputs, with tokens "
        f"{SHARD_SIZE_WITH_TOKENS}; and {MIN_BYTES >> 30} to {MAX_BYTES >> 30} GiB of the sources)"
    )
    update: bool = options.flag(
        "take into a finished table what is new in the sources, and mark what is gone or has changed", recorded=False
    )
    content_hash: bool = options.flag(
        "read every input once more, so that --update recognises it by its contents, not by size and time",
        recorded=False,
    )
    retry_failed: bool = options.flag("try failed rows of finished shards again", recorded=False)
    actors: int | tuple[int, int] | None = options.actors(
        "make shards by N processes of this machine, one per GPU, or with --ray by N actors of a cluster; as 2..8 by "
        "2 to 8 of them, as there is room"
    )
    part: tuple[int, int] | None = options.part(
        "make the I-th of N parts of the shards, from 0/N on, beside other commands that make the others: for arrays "
        "of Slurm and Kubernetes"
    )
    ray: str | None = options.text(
        None,
        "cluster of the actors: HOST:PORT, auto for the one that was started on this machine with ray start, local for "
        "one of its own (default: RAY_ADDRESS)",
        recorded=False,
        metavar="ADDRESS",
    )
    stall: float | None = options.stall(
        600.0, "time without progress after which an actor's shard is made elsewhere, as 10m, none for no limit"
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not None or option.default is not None:
                option.metadata["check"](option.name, value)
        if self.fps is not None and self.every is not None:
            raise ValueError(f"fps, every: expected one of them, got {self.fps} and {self.every}")
        if self.fps is not None and self.frames != NUM_FRAMES:
            raise ValueError(f"frames: rows by fps have one frame each, got {self.frames}; with every=… they have more")

        if self.part is not None and self.update:
            raise ValueError("part: an update is made by one command; leave part or update out")
        if self.ray is not None and self.actors is None:
            raise ValueError(f"ray: {self.ray!r} is the cluster of actors; give how many with actors, too")

    @property
    def in_process(self) -> bool:
        """Whether shards are made in the command's own process, not by actors."""
        return self.actors is None and self.part is None

    @property
    def num_actors(self) -> tuple[int, int]:
        """How many actors there are at least and at most."""
        actors = self.actors or 1
        return actors if isinstance(actors, tuple) else (actors, actors)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Settings:
        """The options among the arguments of a function."""
        return cls(**{option.name: arguments[option.name] for option in fields(cls)})

    @property
    def selection(self) -> Selection:
        """The features that the job keeps."""
        from nopad.pipeline.selection import Selection  # imports torch

        names = ("tokens", "layers", "pool", "tokens_pool")
        return Selection(**{name: getattr(self, name) for name in names})

    @property
    def rows_per_shard(self) -> tuple[int, int]:
        """See `row_limits`, of settings that are `for_inputs`."""
        assert self.shard_size is not None
        return row_limits(self.shard_size)

    def for_inputs(self, num_inputs: int, begun: Mapping[str, str]) -> Settings:
        """These for a number of inputs: with the rows of a shard.

        Args:
            begun: the record of the job that was begun in the folder.
        """
        if self.shard_size is not None:
            return self
        return replace(self, shard_size=default_shard_size(num_inputs, begun, tokens=self.tokens))
