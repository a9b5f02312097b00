"""What is in tars, Parquet files and saved datasets, listed without reading a picture."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from nopad.embedding.inputs.files import open_regular, why
from nopad.embedding.inputs.listing import Input, as_text
from nopad.preprocessing.formats import image_suffixes

VIDEOS = frozenset((".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg"))
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "bytes", "image_bytes")
# What Arrow raises on damaged files.
ARROW_DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError)

_UNPACK = "a compressed tar has no random access: decompress it to a plain .tar (gunzip, unxz, zstd -d)"
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_BLOCK = tarfile.BLOCKSIZE


def suffix_of(name: str) -> str:
    """The last suffix in lower case, both of a compressed tar's, empty for none."""
    name = name.lower()
    return next((suffix for suffix in COMPRESSED_TARS if name.endswith(suffix)), os.path.splitext(name)[1])


def compressed(text: str) -> ValueError:
    return ValueError(f"{text}: {_UNPACK}")


def tar_inputs(path: str, text: str, left_out: Counter[str]) -> Iterator[Input]:
    """The pictures of an uncompressed tar, by seeking from header to header.

    Members of other suffixes are counted in `left_out`, those that are no regular file under `link`, `folder` and
    `special file`. A tar that is cut short or damaged gives its whole members and one `"broken"` input that says where
    it ends.

    Raises:
        ValueError: a compressed tar.
    """
    location = os.fsencode(os.path.abspath(path))

    def broken(reason: str, name: str = os.path.basename(path)) -> Input:
        return Input(as_text(name), text, "broken", location, note=as_text(reason))

    try:
        file = open_regular(location)
    except (OSError, ValueError) as error:
        yield broken(f"cannot be read: {why(error)}")
        return
    with file:
        length = os.fstat(file.fileno()).st_size
        if os.pread(file.fileno(), 8, 0).startswith(_MAGIC):
            raise compressed(text)
        end = 0
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
            while (member := archive.next()) is not None:
                archive.members.clear()  # else about 1 kB stays for each  # pyright: ignore[reportAttributeAccessIssue]
                is_file = member.isreg() and not member.issparse()
                data_end = member.offset_data + member.size if is_file else archive.offset
                if data_end > length:
                    yield broken(f"truncated: {member.name} goes on to byte {data_end}, the file ends at {length}")
                    return
                if archive.offset <= end or member.size < 0:
                    yield broken(f"damaged: the header at byte {member.offset} leads backwards")
                    return
                end = archive.offset
                if is_file and suffix_of(member.name) in image_suffixes():
                    yield Input(as_text(member.name), text, "tar", location, member.offset_data, member.size)
                elif member.issparse():
                    yield broken("a sparse tar member, which cannot be read in place", member.name)
                else:
                    left_out[as_text(suffix_of(member.name)) if is_file else _kind(member)] += 1
            reason = _after_end(file, archive.offset, length)
        except (tarfile.TarError, OSError, ValueError, LookupError, OverflowError, MemoryError) as error:
            reason = f"truncated or damaged at byte {end} of {length}: {why(error)}"
        if reason:
            yield broken(reason)


def _kind(member: tarfile.TarInfo) -> str:
    if member.isdir():
        return "folder"
    return "link" if member.issym() or member.islnk() else "special file"


def _after_end(file: io.FileIO, offset: int, length: int) -> str:
    """What is wrong with a tar from the byte at which tarfile found no further header; empty where it just ends.

    tarfile stops without a word at a damaged header, at a missing end mark and at the end mark of the first of several
    tars that were put together with `cat`.
    """
    block = os.pread(file.fileno(), _BLOCK, offset)
    if len(block) < _BLOCK:
        return f"truncated at byte {length}: the end mark is missing"
    if any(block):
        return f"damaged: no valid header at byte {offset} of {length}"
    if os.pread(file.fileno(), 1 << 20, offset).strip(b"\0"):
        return f"there is more after its end mark at byte {offset} of {length}, which was not read"
    return ""


def image_column(schema: pa.Schema, text: str, wanted: str | None) -> str:
    """Choose the column of encoded images: binary, or a struct with binary `bytes`.

    Raises:
        ValueError: no such column or several, with the columns that there are.
    """
    candidates = [field.name for field in schema if _holds_images(field.type)]
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if wanted is not None:
        if wanted in candidates:
            return wanted
        raise ValueError(f"{text}: --image-column {wanted} is no column of image bytes; got the columns {columns}")
    usual = [name for name in candidates if name in IMAGE_COLUMNS]
    if len(candidates) == 1 or len(usual) == 1:
        return (usual if len(usual) == 1 else candidates)[0]
    found = f"{len(candidates)} columns of bytes" if candidates else "no column of image bytes"
    hint = "; choose one with --image-column" if candidates else ""
    raise ValueError(f"{text}: {found} in {columns}{hint}")


def _holds_images(type: pa.DataType) -> bool:
    if pa.types.is_struct(type):
        return any(field.name == "bytes" and _is_binary(field.type) for field in type)
    return _is_binary(type)


def _is_binary(type: pa.DataType) -> bool:
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type)


def parquet_inputs(path: str, text: str, column: str | None) -> Iterator[Input]:
    """The rows of a Parquet file; one `"broken"` input where its footer cannot be read.

    Raises:
        ValueError: see `image_column`.
    """
    location = os.fsencode(os.path.abspath(path))
    try:
        file = open_parquet(location)
        schema, rows = file.schema_arrow, file.metadata.num_rows
        file.close(force=True)
    except ARROW_DAMAGE as error:
        name = as_text(os.path.basename(path))
        yield Input(name, text, "broken", location, note=f"no Parquet file, or damaged: {why(error)}")
        return
    note = image_column(schema, text, column)
    for row in range(rows):
        yield Input(str(row), text, "parquet", location, row, 0, note)


def open_parquet(path: bytes) -> pq.ParquetFile:
    """Open a Parquet file to be read in small pieces; `close(force=True)` closes it.

    Raises:
        One of `ARROW_DAMAGE`.
    """
    open_regular(path).close()
    # Not mapped: a mapped file that is cut short while it is read would kill the process. Buffered page by page: with
    # pre_buffer, Arrow's default, a whole row group would be held.
    return pq.ParquetFile(pa.OSFile(path, "r"), buffer_size=1 << 20, pre_buffer=False)


def is_dataset(folder: str) -> bool:
    """Whether a folder was written by `datasets`' `save_to_disk`."""
    has = {name: os.path.isfile(os.path.join(folder, name)) for name in ("dataset_info.json", "state.json")}
    return all(has.values()) or os.path.isfile(os.path.join(folder, "dataset_dict.json"))


def dataset_inputs(folder: str, text: str, column: str | None) -> Iterator[Input]:
    """The rows of a saved Hugging Face dataset, of all its splits; one `"broken"` input where it cannot be loaded.

    Raises:
        ValueError: `datasets` is not installed; also see `image_column`.
    """
    location = os.fsencode(os.path.abspath(folder))
    try:
        splits = {split: (data.features.arrow_schema, len(data)) for split, data in load_splits(location).items()}
    except ImportError as error:
        raise ValueError(f"{text}: a saved dataset needs the datasets package: pip install datasets") from error
    except ARROW_DAMAGE as error:
        name = os.path.basename(os.path.abspath(folder))
        yield Input(as_text(name), text, "broken", location, note=f"no dataset that can be loaded: {why(error)}")
        return
    for split, (schema, rows) in splits.items():
        note = f"{split}/{image_column(schema, f'{text} {split}'.rstrip(), column)}"
        for row in range(rows):
            yield Input(f"{split}/{row}" if split else str(row), text, "dataset", location, row, 0, note)


def load_splits(path: bytes) -> dict:
    """The `datasets.Dataset` of each split, of `""` where there are none; rows come as Arrow, nothing is decoded."""
    import datasets

    data = datasets.load_from_disk(os.fsdecode(path))
    splits = data if isinstance(data, datasets.DatasetDict) else {"": data}
    return {str(split): part.with_format("arrow") for split, part in splits.items()}
