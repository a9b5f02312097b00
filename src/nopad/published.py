"""The list of published models as plain data, so that `nopad models` imports neither torch nor transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

UNTRAINED = "untrained:"
"""Before a published name: that architecture with random weights."""

LIST = Path(__file__).with_name("published.json")
"""Written by `python -m nopad.families.published`, from what the families define."""


def published_models() -> list[dict[str, Any]]:
    """Each published model's name, family, sizes and rule for its input, in the order of the families."""
    return json.loads(LIST.read_text(encoding="utf-8"))
