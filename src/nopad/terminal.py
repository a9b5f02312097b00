"""Text for terminals: names without control characters, strict JSON, columns, messages and summaries."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from nopad.inference_imports import import_for_inference
from nopad.local_paths import utf8


def printable(text: str) -> str:
    """`text` as one line, with what a terminal would obey or hide as backslash escapes, such as `\\x1b` and `\\u202e`.

    Escaped are control characters (C0, DEL, C1), line and paragraph separators, format characters (bidi overrides,
    tags; not the joiners that scripts and emoji need), and bytes of file names that are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(char.encode("unicode_escape").decode() if _is_control(char) else char for char in text)


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\u200c\u200d"


def message_lines(text: str) -> str:
    """A message of several lines, each `printable`; those after the first are indented, so that no name begins one."""
    return "\n  ".join(map(printable, text.split("\n")))


def shell_command(arguments: Sequence[str]) -> str:
    """A command to type again: `shlex.join`, with `$'…'` around arguments that are not `printable`."""
    return " ".join(map(_quote, arguments))


def _quote(argument: str) -> str:
    if printable(argument) == argument:
        return shlex.quote(argument)
    escaped = (
        "".join(f"\\x{byte:02x}" for byte in os.fsencode(c)) if _is_control(c) or c in "\\'" else c for c in argument
    )
    return f"$'{''.join(escaped)}'"


def print_error(message: str) -> None:
    """Print a message to stderr, see `message_lines`."""
    print(message_lines(message), file=sys.stderr, flush=True)


def open_standard_files() -> None:
    """Open `os.devnull` as what of standard input, output and errors is closed: a file opened later would be it, and
    messages be written into that."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


class MessageFormatter(logging.Formatter):
    """Formats log records as `message_lines`."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        return message_lines(super().format(record))


class OnceFilter(logging.Filter):
    """Passes each message of a logger once: what holds for a whole command may be found in several of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this record has a message that was not printed before."""
        key = record.name, record.getMessage()
        is_new = key not in self.seen
        self.seen.add(key)
        return is_new


def import_transformers() -> None:
    """Import what of transformers an encoder needs, see `import_for_inference`, and `configure_transformers`."""
    import_for_inference()
    configure_transformers()


def configure_transformers() -> None:
    """Turn off transformers' progress bars and print its log records as `message_lines`, each once."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.get_logger("transformers")  # sets up its handlers
    for handler in logging.getLogger("transformers").handlers:
        handler.setFormatter(MessageFormatter())
        if type(handler) is logging.StreamHandler:  # transformers' own, with the filter of this command alone
            handler.filters = [each for each in handler.filters if not isinstance(each, OnceFilter)]
            handler.addFilter(OnceFilter())


_NUMBERS = re.compile(r"-\d+(,-?\d+)+")


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors are `printable`, and that takes `--layers -4,-1`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse as argparse does, with `-4,-1` as a value; argparse alone takes it for an option."""
        joined: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if _NUMBERS.fullmatch(word) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        """Print usage and message to stderr and exit with status 2."""
        super().error(printable(message))


def print_progress(line: str) -> None:
    """Print a line to stderr; a log that cannot be written does not end a run."""
    with suppress(OSError):
        print(f"· {printable(line)}", file=sys.stderr, flush=True)


def json_text(value: Any) -> str:
    """`value` as strict JSON: floats that are not finite are null, bytes of names that are not UTF-8 are escaped."""
    return json.dumps(_strict(value), indent=2, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_strict(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, str):
        with suppress(UnicodeEncodeError):
            value = utf8(value).decode("utf-8", "surrogateescape")  # the same whatever the locale
        return value.encode("utf-8", "backslashreplace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_summary(text: str) -> None:
    """Print a summary, each line `printable`. What cannot be printed does not change the exit status.

    No message is printed where the reader has closed a pipe, as `head` does.
    """
    try:
        print("\n".join(map(printable, text.split("\n"))), flush=True)
    except OSError as error:
        with suppress(OSError):
            if not isinstance(error, BrokenPipeError):
                print(f"nopad: done, but the summary cannot be printed: {error}", file=sys.stderr)
        # Python flushes stdout again when it ends, and would fail with an exit status of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows, the first of them the header, as aligned columns of `printable` cells; numbers to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [i > 0 and any(row[i][:1].isdigit() for row in rows[1:]) for i in range(len(widths))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]
