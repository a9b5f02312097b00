"""Advice to install an extra of nopad, for messages."""

from __future__ import annotations


def install(*extras: str) -> str:
    """The command that installs extras; nopad is installed from a clone and is in no package index."""
    return f"pip install '.[{','.join(extras)}]' in a clone of nopad"
