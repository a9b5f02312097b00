"""Images in tars, listed without reading one."""

from __future__ import annotations

import io
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping

from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.names import HIDDEN, as_text, is_in_hidden, suffix_of
from nopad.embedding.inputs.reaching import location_of, retry, source_errors
from nopad.local_paths import utf8
from nopad.preprocessing.files import open_source, read_at, size_of, why
from nopad.preprocessing.formats import image_suffixes
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS
from nopad.preprocessing.reachable import is_unreachable

MAX_HEADER_BYTES = 1 << 20
"""Most bytes of a member's headers, all that stand before its data: long names, attributes, maps of sparse files."""

MAX_GLOBAL_BYTES = 1 << 16
"""Most bytes of a tar's global attributes, which apply to every member behind them."""

COMPRESSED = "a compressed tar has no random access: decompress it to a plain .tar (gunzip, unxz, zstd -d)"
"""The reason why a compressed tar is not read, with advice."""

_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_BLOCK = tarfile.BLOCKSIZE
_GLOBAL, _ATTRIBUTES, _NAMES = b"g", (b"x", b"X", b"g"), (b"L", b"K")  # types of headers that something follows
_ATTRIBUTE_BYTES = 64  # of memory, beside its name and value
_LONG_NUMBER = re.compile(rb"(?<!\d)\d{256}")
# What tarfile raises on damaged headers.
_DAMAGE = (tarfile.TarError, OSError, ValueError, LookupError, OverflowError, MemoryError)


class CompressedTarError(ValueError):
    """A compressed tar, whatever its name."""

    def __init__(self, text: str) -> None:
        super().__init__(f"{text}: {COMPRESSED}")


def tar_inputs(
    path: str, text: str, left_out: Counter[str], *, hidden: bool = False, timeout: float | None = None
) -> Iterator[Input]:
    """The images of an uncompressed tar, by seeking from header to header.

    A hard link gives the image that it stands for. Members of other suffixes are counted in `left_out`, those that
    are no regular file under `link`, `folder` and `special file`, those that `is_in_hidden` under `hidden`, unless
    `hidden` takes them. A tar that is cut short or damaged gives its whole members and one `"broken"` input that says
    where it ends.

    Args:
        path: or an address.
        timeout: see `open_source`.

    Raises:
        CompressedTarError: a compressed tar.
        UnreachableSourceError: it cannot be reached.
    """
    location = location_of(path)

    def broken(reason: str, name: str | bytes = os.path.basename(path)) -> Input:
        return Input(as_text(name), text, "broken", location, note=as_text(reason))

    with source_errors(text):
        try:
            file = retry(lambda: open_source(location, timeout))
        except (OSError, ValueError) as error:
            if is_unreachable(error):
                raise
            yield broken(f"cannot be read: {why(error)}")
            return
    with file, source_errors(text):
        if _is_compressed(file):
            raise CompressedTarError(text)
        members = _Members(file)
        links: dict[int, tuple[int, int]] | None = None
        for member in members:
            suffix = suffix_of(member.name)
            is_picture = suffix in image_suffixes()
            if is_picture and not hidden and is_in_hidden(member.name):
                left_out[HIDDEN] += 1
            elif member.issparse():
                yield broken("a sparse tar member, which cannot be read in place", utf8(member.name))
            elif member.islnk() and is_picture:
                links = _linked_data(file) if links is None else links
                if member.offset in links:
                    yield Input(as_text(utf8(member.name)), text, "tar", location, *links[member.offset])
                else:
                    reason = f"a hard link to {member.linkname}, which is not in the tar before it"
                    yield broken(reason, utf8(member.name))
            elif member.isreg() and is_picture:
                yield Input(as_text(utf8(member.name)), text, "tar", location, member.offset_data, member.size)
            else:
                left_out[as_text(utf8(suffix)) if member.isreg() else _kind(member)] += 1
        if members.damage:
            yield broken(members.damage)


def members_of(path: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the regular members of a tar, as far as it is whole; of one that cannot be read none.

    Raises:
        OSError: it cannot be reached.
    """
    try:
        file = retry(lambda: open_source(path, INPUT_TIMEOUT_SECONDS))
    except (OSError, ValueError) as error:
        if is_unreachable(error):
            raise
        return
    with file:
        for member in _Members(file):
            if member.isreg() and not member.issparse():
                yield as_text(utf8(member.name)), member.offset_data, member.size


def is_compressed(path: bytes) -> bool:
    """Whether a tar is compressed, whatever its name.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    with retry(lambda: open_source(path, INPUT_TIMEOUT_SECONDS)) as file:
        return _is_compressed(file)


def _is_compressed(file: io.RawIOBase) -> bool:
    return retry(lambda: read_at(file, 8, 0)).startswith(_MAGIC)


def _kind(member: tarfile.TarInfo) -> str:
    if member.isdir():
        return "folder"
    return "link" if member.issym() or member.islnk() else "special file"


class _Members:
    """The members of a tar whose data are whole; after them `damage` describes what is wrong with it, if anything."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self._length = size_of(file)
        self.damage = ""

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        end = 0
        try:
            self._file.seek(0)
            headers = _Headers(self._file)
            archive = tarfile.open(fileobj=headers, mode="r:", encoding="utf-8")  # noqa: SIM115  # pyright: ignore[reportCallIssue, reportArgumentType]
            while (member := archive.next()) is not None:
                archive.members.clear()  # else about 1 kB stays for each  # pyright: ignore[reportAttributeAccessIssue]
                if headers.begin_member():
                    _check_global(archive.pax_headers)
                has_data = member.isreg() and not member.issparse()
                data_end = member.offset_data + member.size if has_data else archive.offset
                if data_end > self._length:
                    goes_on = f"{member.name} goes on to byte {data_end}, the file ends at {self._length}"
                    self.damage = f"truncated: {goes_on}"
                    return
                if archive.offset <= end or member.size < 0:
                    self.damage = f"damaged: the header at byte {member.offset} leads backwards"
                    return
                end = archive.offset
                yield member
            self.damage = _after_end(self._file, archive.offset, self._length)
        except RecursionError:  # tarfile calls itself for the header behind a long name
            self.damage = f"damaged at byte {end} of {self._length}: hundreds of headers of one member"
        except _DAMAGE as error:
            if is_unreachable(error):
                raise
            self.damage = f"truncated or damaged at byte {end} of {self._length}: {why(error)}"


class _Headers:
    """A tar's file as tarfile reads it: nothing but headers, so many bytes for each member.

    tarfile takes time and memory that grow with the square of what attributes hold, unless they are well-formed.
    """

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self._left = MAX_HEADER_BYTES
        self._kind = b""  # of the header that was read last, where something follows it
        self._has_global = False

    def begin_member(self) -> bool:
        """Allow for the headers of the next member; whether there were global attributes since the last call."""
        self._left, self._kind = MAX_HEADER_BYTES, b""
        had_global, self._has_global = self._has_global, False
        return had_global

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADER_BYTES} bytes")
        self._left -= size
        data = retry(lambda: self._file.read(size)) or b""
        if self._kind:
            if self._kind in _ATTRIBUTES:
                _check_attributes(data)
            self._kind = b""
        elif size == _BLOCK:
            kind = data[156:157]
            self._kind = kind if kind in (*_ATTRIBUTES, *_NAMES) else b""
            self._has_global = self._has_global or kind == _GLOBAL
        return data


def _check_attributes(data: bytes) -> None:
    """Refuse attributes that are no records of `"%d %s=%s\\n"`, whose number is their length (POSIX, pax)."""
    position = 0
    while position < len(data) and data[position]:
        space = data.find(b" ", position, position + 8)
        number = data[position:space]
        end = position + int(number) if space >= 0 and number.isdigit() else position
        if data.find(b"=", space, end) < 0 or data[end - 1 : end] != b"\n":
            raise tarfile.ReadError("attributes that are damaged")
        position = end
    if _LONG_NUMBER.search(data):
        raise tarfile.ReadError("attributes with a number of hundreds of digits")


def _check_global(attributes: Mapping[str, str]) -> None:
    if sum(_ATTRIBUTE_BYTES + len(name) + len(value) for name, value in attributes.items()) > MAX_GLOBAL_BYTES:
        raise tarfile.ReadError(f"its global attributes take more than {MAX_GLOBAL_BYTES} bytes")


def _linked_data(file: io.RawIOBase) -> dict[int, tuple[int, int]]:
    """Offset and size of the data of each hard link, by the offset of the link's header."""
    targets = {_normal(member.linkname) for member in _Members(file) if member.islnk()}
    before: dict[str, tuple[int, int]] = {}
    links: dict[int, tuple[int, int]] = {}
    for member in _Members(file):
        name = _normal(member.name)
        if member.islnk() and (data := before.get(_normal(member.linkname))):
            links[member.offset] = data
        elif member.isreg() and not member.issparse():
            data = member.offset_data, member.size
        else:
            continue
        if name in targets:
            before[name] = data
    return links


def _normal(name: str) -> str:
    return posixpath.normpath(name)


def _after_end(file: io.RawIOBase, offset: int, length: int) -> str:
    """Damage of a tar from the byte at which tarfile found no further header, in words; empty where it just ends.

    tarfile stops without a word at a damaged header, at a missing end mark and at the end mark of the first of several
    tars that were put together with `cat`.
    """
    block = retry(lambda: read_at(file, _BLOCK, offset))
    if len(block) < _BLOCK:
        return f"truncated at byte {length}: the end mark is missing"
    if any(block):
        return f"damaged: no valid header at byte {offset} of {length}"
    if retry(lambda: read_at(file, 1 << 20, offset)).strip(b"\0"):
        return f"there is more after its end mark at byte {offset} of {length}, which was not read"
    return ""
