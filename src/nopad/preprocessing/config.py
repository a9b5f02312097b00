"""Reads a checkpoint's `preprocessor_config.json` as a rule of `nopad.preprocessing.transforms`."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

from nopad.counts import is_count
from nopad.preprocessing.rules import Preprocessing, Resample, Rule

logger = logging.getLogger(__name__)

_RESAMPLE: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}
# The models whose processors transformers has without torchvision, too.
_PROCESSORS = {
    "CLIPImageProcessor": "clip",
    "SiglipImageProcessor": "siglip",
    "Siglip2ImageProcessor": "siglip2",
    "ViTImageProcessor": "vit",
    "BitImageProcessor": "bit",
    "Qwen2VLImageProcessor": "qwen2_vl",
    "PixtralImageProcessor": "pixtral",
}
# Of models whose processors need torchvision: what the rules of their families do not say.
_OTHER_PROCESSORS = {
    "DINOv3ViTImageProcessor": {},
    "Tipsv2ImageProcessor": {"do_normalize": False},
    "Kimi_K25ImageProcessor": {},
}
_CLASS_KEYS = """
size crop_size resample image_mean image_std do_resize do_center_crop do_rescale do_normalize default_to_square
rescale_factor max_num_patches
"""
_PIXELS = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
"""Keys of `size` of Qwen2VLImageProcessor, and their older names beside it."""
# Steps of other processors that no rule here has.
_OTHER_STEPS = """
do_pad do_thumbnail do_align_long_axis do_flip_channel_order do_image_splitting do_split_image do_grayscale
do_color_quantize crop_pct crop_mode size_divisor min_pixels max_pixels
"""
_SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "default_to_square")


def read_preprocessor_config(
    config: Mapping[str, Any], default: Preprocessing, whose: str = "preprocessor config"
) -> Preprocessing:
    """Read a checkpoint's `preprocessor_config.json`, whose keys override the family's `default`.

    A key that is absent or null has the default of the processor class that the config names, if it names one.

    Args:
        config: the JSON object of the file.
        default: the family's rule.
        whose: name of the config, for messages.

    Raises:
        ValueError: a value of another type than its key has, or a combination that no rule here reproduces.
    """
    try:
        return _read({key: value for key, value in config.items() if value is not None}, default)
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from error


def _read(fields: dict[str, Any], default: Preprocessing) -> Preprocessing:
    """The rule of a preprocessor config without nulls."""
    processor = fields.get("image_processor_type", fields.get("feature_extractor_type", ""))
    if not isinstance(processor, str):
        raise ValueError(f"image_processor_type: expected the name of a class, got {processor!r:.80}")
    processor = processor.replace("FeatureExtractor", "ImageProcessor")  # as transformers reads the older name
    config = {**_class_defaults(processor), **fields}
    for key in _SWITCHES:
        if not isinstance(config.get(key, True), bool):
            raise ValueError(f"{key}: expected true or false, got {config[key]!r:.80}")
    smart_resize = processor.startswith("Qwen2VL") or (not processor and default.rule == "smart_resize")
    navit = processor.startswith("Kimi_K25") or (not processor and default.rule == "navit")
    longest_edge = processor.startswith("Pixtral") or (not processor and default.rule == "longest_edge")
    # Pixtral's pads images to those of their batch alone.
    read = _PIXELS.values() if smart_resize else ("do_pad",) if longest_edge else ()
    steps = {key: config[key] for key in _OTHER_STEPS.split() if config.get(key) and key not in read}
    if steps:
        raise ValueError(f"got {steps!r:.200}, steps that no rule here has; give pack and embed a preprocessing=")
    of_rule = _pixels_of_smart_resize if smart_resize else _longest_edge if longest_edge else _rule_and_size
    of_rule = _patches_of_navit if navit else of_rule
    rule, size, short_side = of_rule(config, processor, default)
    if rule != default.rule:
        logger.info("the checkpoint's preprocessor config has rule %r, not %r", rule, default.rule)
    max_patches = default.max_patches if rule == default.rule else None
    resample = default.resample
    if "resample" in config and rule != "native":
        if not is_count(config["resample"]) or config["resample"] not in _RESAMPLE:
            raise ValueError(f"resample: expected 2 (bilinear) or 3 (bicubic), got {config['resample']!r:.80}")
        resample = _RESAMPLE[config["resample"]]
    normalize = config.get("do_normalize", True)
    rescale = config.get("do_rescale", True)
    return Preprocessing(
        rule=rule,
        size=size,
        short_side=short_side,
        max_patches=config.get("max_num_patches", max_patches) if rule == "naflex" else max_patches,
        multiple_of=default.multiple_of,
        resample=resample,
        mean=_three(config.get("image_mean", default.mean)) if normalize else (0.0, 0.0, 0.0),
        std=_three(config.get("image_std", default.std)) if normalize else (1.0, 1.0, 1.0),
        rescale_factor=config.get("rescale_factor", default.rescale_factor) if rescale else 1.0,
        rescale_before_resize=processor.startswith("DINOv3") if processor else default.rescale_before_resize,
    )


def _processors_of_transformers() -> set[str]:
    """Names of all image processors of transformers; imported here, since most checkpoints need none of it."""
    from transformers.models.auto.image_processing_auto import (
        IMAGE_PROCESSOR_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
    )

    return {
        class_name.removesuffix("Fast").removesuffix("Pil")
        for names in IMAGE_PROCESSOR_MAPPING_NAMES.values()
        for class_name in (names.values() if isinstance(names, dict) else names)
        if isinstance(class_name, str)
    }


def _class_defaults(processor: str) -> dict[str, Any]:
    """Defaults of the processor class of transformers that a preprocessor config names."""
    name = processor.removesuffix("Fast").removesuffix("Pil")
    if name in _OTHER_PROCESSORS:
        return _OTHER_PROCESSORS[name]
    if name not in _PROCESSORS:
        if name in _processors_of_transformers():
            raise ValueError(
                f"image_processor_type: expected {', '.join(_PROCESSORS)} or {' or '.join(_OTHER_PROCESSORS)}, got "
                f"{processor!r}, whose steps no rule here has; give pack and embed a preprocessing="
            )
        return {}
    module = importlib.import_module(
        f"transformers.models.{_PROCESSORS[name]}.image_processing_pil_{_PROCESSORS[name]}"
    )
    defaults = {key: getattr(getattr(module, f"{name}Pil"), key, None) for key in _CLASS_KEYS.split()}
    return {"do_center_crop": False} | {key: value for key, value in defaults.items() if value is not None}


def _rule_and_size(
    config: dict[str, Any], processor: str, default: Preprocessing
) -> tuple[Rule, int | None, int | None]:
    """The rule of a preprocessor config without nulls, its size, and the short side before a crop."""
    sized = "size" in config or "crop_size" in config
    naflex = "max_num_patches" in config or processor.startswith("Siglip2") or (default.rule == "naflex" and not sized)
    short = {"shortest_edge": default.short_side or default.size}
    size = config.get("size", short if default.rule == "crop" else default.size)
    if isinstance(size, Mapping):
        size = {key: value for key, value in size.items() if value is not None}
        square = size.keys() == {"height", "width"}
    else:  # CLIP's processor reads a plain number as the short side, the others as both sides
        clip = default.rule == "crop" or processor.startswith("CLIP") or config.get("do_center_crop", False)
        square = config.get("default_to_square", not clip)
    crops = not naflex and ("crop_size" in config or (default.rule == "crop" and not square))
    crops = config.get("do_center_crop", crops)
    if not config.get("do_resize", default.rule != "native" or sized or naflex):
        rule, side, short_side, possible = "native", None, None, not crops
    elif naflex:
        rule, side, short_side, possible = "naflex", None, None, not crops
    else:
        resized = side = _side(size, "size")
        if crops:
            side = _side(config.get("crop_size", resized if "size" in config else default.size), "crop_size")
        short_side = resized if side < resized else None
        rule, possible = ("square", side == resized) if square else ("crop", crops and side <= resized)
    if not possible:
        keys = ("do_resize", "size", "do_center_crop", "crop_size", "max_num_patches")
        raise ValueError(
            "expected no resize and no crop, a short side and a centre crop that it holds, "
            f"a square, or max_num_patches and no crop; got { {key: config[key] for key in keys if key in config} }"
        )
    return rule, side, short_side


def _pixels_of_smart_resize(
    config: dict[str, Any], processor: str, default: Preprocessing
) -> tuple[Rule, tuple[int, int] | None, None]:
    """The rule of a preprocessor config of Qwen2VLImageProcessor, and the least and most pixels."""
    if config.get("do_center_crop") or "crop_size" in config:
        raise ValueError("do_center_crop: expected false for Qwen2VLImageProcessor, which does not crop")
    if not config.get("do_resize", True):
        return "native", None, None
    current = dict(zip(_PIXELS, default.size, strict=True)) if isinstance(default.size, tuple) else {}
    size = config.get("size", current)
    if not isinstance(size, Mapping):
        raise ValueError(f"size: expected {{'shortest_edge': n, 'longest_edge': n}}, got {size!r:.80}")
    pixels = tuple(config.get(older, size.get(key)) for key, older in _PIXELS.items())
    if not all(map(is_count, pixels)):
        raise ValueError(f"size: expected pixels for {' and '.join(_PIXELS)}, got {size!r:.80}")
    return "smart_resize", pixels, None  # pyright: ignore[reportReturnType] - two counts


def _longest_edge(config: dict[str, Any], processor: str, default: Preprocessing) -> tuple[Rule, int | None, None]:
    """The rule of a preprocessor config of PixtralImageProcessor, and the most pixels of the long side.

    Its `patch_size` is not read: PixtralProcessor calls it with that of the model.
    """
    if config.get("do_center_crop"):
        raise ValueError("do_center_crop: expected false for PixtralImageProcessor, whose sides are whole patches")
    if not config.get("do_resize", True):
        return "native", None, None
    size = config.get("size", default.size)
    if isinstance(size, Mapping):
        sides = {value for value in size.values() if value is not None}
        size = sides.pop() if "shortest_edge" not in size and len(sides) == 1 else size
    if not is_count(size):
        raise ValueError(f"size: expected {{'longest_edge': n}} or equal height and width, got {size!r:.80}")
    return "longest_edge", size, None  # pyright: ignore[reportReturnType] - a count


def _patches_of_navit(
    config: dict[str, Any], processor: str, default: Preprocessing
) -> tuple[Rule, tuple[int, int] | None, None]:
    """The rule of a preprocessor config of Kimi_K25ImageProcessor, and the most patches, of all and of a side."""
    if not config.get("do_resize", True):
        return "native", None, None
    most, side = default.size if default.rule == "navit" and isinstance(default.size, tuple) else (16384, 512)
    size = config.get("size", {"max_height": side, "max_width": side})
    if not isinstance(size, Mapping) or size.keys() != {"max_height", "max_width"} or len({*size.values()}) != 1:
        raise ValueError(f"size: expected equal max_height and max_width in patches, got {size!r:.80}")
    return "navit", (config.get("max_patches", most), size["max_height"]), None


def _side(size: Any, key: str) -> int:
    """The one number in a size of a preprocessor config."""
    has_one_side = isinstance(size, Mapping) and set(size) in ({"shortest_edge"}, {"height", "width"})
    side, *others = size.values() if has_one_side else (size,)
    if not isinstance(side, int) or not is_count(side) or any(other != side for other in others):
        raise ValueError(f"{key}: expected pixels, {{'shortest_edge': n}} or equal height and width, got {size!r:.80}")
    return side


def _three(values: Any) -> tuple[Any, ...]:
    """One number for all colours, or one for each, which `Preprocessing` checks."""
    return tuple(values) if isinstance(values, list | tuple) else (values,) * 3


def values_and_filter(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`mean`, `std` and `interpolation` of timm's and OpenCLIP's configs, as a preprocessor config has them.

    Bicubic unless given; a filter that has no number there is returned as it is, and refused when the rule is read.
    """
    names = {"mean": "image_mean", "std": "image_std"}
    interpolation = fields.get("interpolation")
    numbers: dict[Any, int] = {name: number for number, name in _RESAMPLE.items()}
    if interpolation is None:
        interpolation = "bicubic"
    if isinstance(interpolation, str):
        interpolation = numbers.get(interpolation, interpolation)
    values = {names[name]: fields[name] for name in names if fields.get(name) is not None}
    return {**values, "resample": interpolation}
