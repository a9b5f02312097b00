"""`python -m nopad.families.published`: writes the list that `nopad models` prints, after a change of `PUBLISHED`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from nopad.atomic import atomic_write
from nopad.encoder import PackedEncoder
from nopad.families import ENCODERS, encoder_class
from nopad.published import LIST


def describe_published() -> Iterator[dict[str, Any]]:
    """A row for each published model, measured on the model itself."""
    for family in map(encoder_class, ENCODERS):
        for name in family.published:
            yield _describe(family, name)


def _describe(family: type[PackedEncoder], name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model = family(family.published_config(name))
    return {
        "name": name,
        "family": model.family,
        "hidden_size": model.hidden_size,
        "layers": model.config.num_hidden_layers,
        "heads": model.config.num_attention_heads,
        "patch_size": model.config.patch_size,
        "parameters": model.num_parameters(),
        "input": model.default_preprocessing.describe().split(";")[0],
    }


def write_list() -> None:
    """Write the list: a line for each model."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in describe_published())
    with atomic_write(LIST) as file:
        file.write(f"[\n{lines}\n]\n".encode())


if __name__ == "__main__":
    write_list()
