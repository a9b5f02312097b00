"""What the commands share: exit statuses, and tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

PASSED, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows, the first of them the header, as aligned columns; numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [i > 0 and any(row[i][:1].isdigit() for row in rows[1:]) for i in range(len(widths))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]
