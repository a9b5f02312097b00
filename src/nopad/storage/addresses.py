"""Addresses of objects: which are read, and their parts."""

from __future__ import annotations

import importlib.util
import os
import posixpath
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from nopad.extras import install
from nopad.local_paths import utf8

CLOUDS = ("s3", "gs", "az", "abfs", "abfss")
WEB = ("https", "http")
HUB = "hf"
SCHEMES = (*CLOUDS, *WEB, HUB)
"""Those that are read."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_FILE = "file://"


def scheme_of(name: str | bytes) -> str:
    """The scheme of an address that is read, empty for a path and for any other address."""
    match = _SCHEME.match(os.fsdecode(name))
    return match[1] if match and match[1] in SCHEMES else ""


def is_address(name: str) -> bool:
    """Whether a name is an address of any scheme."""
    return _SCHEME.match(name) is not None


def local_path(name: str) -> str:
    """The path of an address `file:///…`; any other name as it is."""
    return unquote(name[len(_FILE) :]) if name.startswith(f"{_FILE}/") else name


def check_address(name: str, address: str) -> None:
    """Check that an address is one that can be read here; paths pass.

    Args:
        name: of the argument, for the message.

    Raises:
        ValueError: another scheme, or no bucket or host.
        ImportError: a package is missing.
    """
    match = _SCHEME.match(address)
    if match is None or address.startswith(f"{_FILE}/"):
        return
    scheme = match[1]
    if scheme not in SCHEMES:
        schemes = ", ".join(f"{each}://" for each in SCHEMES)
        raise ValueError(
            f"{name}: expected a path or an address that begins with {schemes} or file:///, got {address!r}; mount it "
            f"as a folder (rclone mount, sshfs, …) or copy it first"
        )
    if not address[match.end() :].strip("/"):
        raise ValueError(f"{name}: expected a bucket or a host behind {scheme}://, got {address!r}")
    if scheme != HUB and importlib.util.find_spec("obstore") is None:
        raise ImportError(f"{name}: reading {scheme}:// needs obstore: {install('cloud')}")


@dataclass(frozen=True)
class Address:
    """An object, or a prefix of objects.

    Attributes:
        base: the store: scheme and bucket, container or host; of an address with a query all of it.
        key: the object's in that store, without slashes at its ends.
    """

    base: str
    key: str

    @classmethod
    def of(cls, address: str | bytes) -> Address:
        """The parts of an address. Keys are written as they are; in those of the web, `%20` is a space.

        Steps in keys (`.`, `..`, empty ones) are taken as in paths.
        """
        text = (address if isinstance(address, bytes) else utf8(address)).decode("utf-8", "surrogateescape")
        scheme, rest = text.split("://", 1)
        if scheme in WEB:
            parts = urlsplit(text)
            if parts.query or "%2f" in parts.path.lower():
                return cls(text, "")
            return cls(f"{scheme}://{parts.netloc}", _normal(unquote(parts.path)))
        depth = 3 if scheme == HUB else 1  # datasets/owner/name
        start, key = rest.split("/")[:depth], rest.split("/")[depth:]
        return cls(f"{scheme}://{'/'.join(start)}", _normal("/".join(key)))

    @property
    def scheme(self) -> str:
        """Its scheme."""
        return self.base.split("://", 1)[0]

    def __str__(self) -> str:
        return f"{self.base}/{self.key}" if self.key else self.base


def join(folder: str, name: str) -> str:
    """The address of a name, relative or an address itself, in a folder, without steps."""
    if scheme_of(name):
        return name
    address = f"{folder}/{name}"
    if scheme_of(folder) in WEB:
        parts = urlsplit(address)
        return parts._replace(path=f"/{_normal(parts.path)}").geturl()
    return str(Address.of(address))


def is_below(folder: str, address: str) -> bool:
    """Whether an address lies below a folder, however it spells that."""
    outer, inner = Address.of(folder), Address.of(address)
    if scheme_of(address) in WEB:  # of one with a query the base is all of it
        parts = urlsplit(address)
        inner = Address(f"{parts.scheme}://{parts.netloc}", _normal(unquote(unquote(parts.path))))
    prefix = f"{outer.key}/" if outer.key else ""
    # Servers may take a backslash for a step.
    return inner.base == outer.base and f"{inner.key}/".startswith(prefix) and "\\" not in inner.key


def _normal(key: str) -> str:
    """A key without steps; those above the top are kept, and refused by stores."""
    normal = posixpath.normpath(key.strip("/"))
    return "" if normal == "." else normal
