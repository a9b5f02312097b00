"""What a family has to have beside its code: a family that is registered without it fails here."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from tiny_encoders import DISTINCT, FAMILIES, encoder_class, on_meta

from nopad.align.reference_model import RemoteCodeReference
from nopad.align.references import reference_of
from nopad.checkpoints.dialects import DIALECTS
from nopad.checkpoints.keywords import config_classes
from nopad.families import ENCODERS
from nopad.families import encoder_class as class_of_family

ROOT = Path(__file__).parents[2]
HEADER = (
    "encoder",
    "layouts",
    "reference of `nopad align`",
    "text tower",
    "quantised weights",
    "clips",
    "output beside tokens",
)
CLASSES = {family: class_of_family(family) for family in ENCODERS}

every_family = pytest.mark.parametrize("family", ENCODERS)


@cache
def published(family):
    """An encoder of each published architecture that differs in more than its sizes, without memory."""
    cls, encoders = CLASSES[family], {}
    for name in cls.published:
        with on_meta():
            encoder = cls(cls.published_config(name))
        parts = (encoder.head is None, encoder.projection is None, encoder.num_prefix_tokens)
        encoders.setdefault((type(encoder), *parts), encoder)
    return list(encoders.values())


def reference(family):
    """How the originals are called."""
    encoders = published(family)
    of_family = reference_of(encoders[0])
    if isinstance(of_family, RemoteCodeReference):
        return "the checkpoint's own code"
    if of_family.package is not None:
        return f"{of_family.package}'s model"
    return ", ".join(dict.fromkeys(f"`{of_family.class_of(encoder).__name__}`" for encoder in encoders))


def clips(family):
    """What attends to what in a clip."""
    frames = "a whole clip attends" if CLASSES[family].frames_attend_jointly else "frames are images"
    return "pairs of frames are images" if published(family)[0].temporal_patch_size == 2 else frames


def outputs(family):
    """Fields of the output that some published model has."""
    encoders = published(family)
    fields = {
        "prefix_tokens": any(encoder.num_prefix_tokens for encoder in encoders),
        "image_embeds": any(encoder.projection is not None for encoder in encoders),
        "merged": any(encoder.merger is not None for encoder in encoders),
        "deepstack_features": any(encoder.deepstack_layers for encoder in encoders),
    }
    return ", ".join(["`pooled`", *(f"`{name}`" for name, has in fields.items() if has)])


def row(family):
    """The family's row in the table of docs/encoders.md."""
    cls = CLASSES[family]
    return (
        f"`{ENCODERS[family]}`",
        "; ".join(dialect.name for dialect in DIALECTS[family]),
        reference(family),
        "yes" if cls.text_rules is not None else "–",
        "torchao, bitsandbytes" if cls.can_be_quantised else "refused",
        clips(family),
        outputs(family),
    )


def table(page, header):
    """The cells of the table with this header, by its first column."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = lines.index(f"| {' | '.join(header)} |") + 2
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[start:] if line[:1] == "|"]
    return {cell[0]: cell for cell in cells if len(cell) == len(header)}


@every_family
def test_table_of_encoders_says_what_the_code_does(family):
    expected = row(family)
    assert table("docs/encoders.md", HEADER)[expected[0]] == expected


def test_every_config_has_a_tiny_encoder_that_the_tests_of_all_families_take():
    tested = {encoder_class(family).config_class for family in FAMILIES}
    assert {config_class for cls in CLASSES.values() for config_class in config_classes(cls)} <= tested


def test_every_file_of_a_family_has_a_tiny_encoder_in_the_tests_of_distinct_code():
    assert {encoder_class(family).__module__ for family in DISTINCT} == {cls.__module__ for cls in CLASSES.values()}


@every_family
def test_every_config_has_a_published_model(family):
    kinds = {type(encoder.config) for encoder in published(family)}
    assert kinds == set(config_classes(CLASSES[family]))


@every_family
def test_parity_of_a_published_model_is_in_the_readme(family):
    if isinstance(reference_of(published(family)[0]), RemoteCodeReference):
        pytest.skip("the original's code comes with its weights alone")
    names = re.findall(
        r"^\| `([\w./-]+)`.* \| float32 \| 1\.0000000 \|", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert CLASSES[family].published.keys() & set(names)
