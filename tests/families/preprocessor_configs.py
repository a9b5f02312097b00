"""Preprocessor configs beside a checkpoint, and what an encoder makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import nopad


def assert_preprocessing(folder: Path, config: dict[str, Any], expected: tuple[str, Any] | str) -> None:
    """A preprocessor config beside a checkpoint makes this rule of this size, or is refused with this message."""
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    encoder = nopad.load(folder)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            encoder.preprocessing  # noqa: B018 - reads it
    else:
        assert (encoder.preprocessing.rule, encoder.preprocessing.size) == expected
