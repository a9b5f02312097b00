"""Keyword arguments of `from_pretrained` and `save_pretrained`: each is applied, or refused by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from nopad.suggestions import did_you_mean

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

_HUB_NAMES = """
revision cache_dir token local_files_only force_download subfolder proxies variant use_safetensors
"""
# Some have no effect in transformers either: those that are older, and those of its Auto classes.
_LOADER_NAMES = """
device_map max_memory offload_folder offload_buffers quantization_config output_loading_info attn_implementation
distributed_config device_mesh tp_plan tp_size use_kernels kernel_config allow_all_kernels tqdm_class
trust_remote_code low_cpu_mem_usage offload_state_dict mirror _fast_init _from_auto _from_pipeline _commit_hash
"""
HUB = frozenset(_HUB_NAMES.split())
"""Arguments of `open_checkpoint`."""
LOADER = frozenset(_LOADER_NAMES.split())
"""Arguments of transformers' loader."""
_ENCODER = frozenset(("config", "attention", "patch_order", "positions", "prefix", "dtype", "head"))
_REFUSED = {
    "ignore_mismatched_sizes": "loading is strict",
    "key_mapping": "loading is strict; rename the tensors of the file",
    "state_dict": "that goes with None for the checkpoint, and a config",
    "weights_only": "pickles are read for tensors alone",
    "disable_mmap": "files are mapped",
    "gguf_file": "GGUF is not read",
    "from_tf": "TensorFlow's weights are not read",
    "from_flax": "Flax's weights are not read",
    "generation_config": "an encoder generates nothing",
    "adapter_kwargs": "adapters are loaded by PEFT",
}


def read_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` without those whose value is the default behaviour.

    Raises:
        ValueError: an argument that has no effect here.
    """
    remaining = {name: value for name, value in keywords.items() if name not in ("torch_dtype", *_REFUSED)}
    if remaining.get("dtype") is None and keywords.get("torch_dtype") is not None:
        remaining["dtype"] = keywords["torch_dtype"]
    for name, reason in _REFUSED.items():
        value = keywords.get(name)
        if isinstance(value, dict) and not any(each is not None for each in value.values()):
            value = None  # as transformers' Auto classes pass adapter_kwargs
        if value is False if name == "weights_only" else value is not None and value is not False:
            raise ValueError(f"from_pretrained: got {name}={value!r:.80}, but {reason}")
    return remaining


def take_changes(keywords: dict[str, Any], config: PreTrainedConfig | None) -> dict[str, Any]:
    """Remove from `keywords` the arguments that change the config, and return them, as transformers' loader does.

    Raises:
        TypeError: such an argument beside a whole config.
    """
    changes = {name: keywords.pop(name) for name in sorted(keywords.keys() - LOADER)}
    if changes and config is not None:
        raise TypeError(f"from_pretrained: got {', '.join(changes)} beside a config; change the config itself")
    return changes


def with_changes(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of the config with the `changes`.

    Raises:
        TypeError: a field that the config does not have.
    """
    check_keywords("from_pretrained", changes, encoder_fields(config), LOADER | _ENCODER | HUB | {"torch_dtype"})
    config = copy.deepcopy(config) if changes else config
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def encoder_fields(config: PreTrainedConfig) -> set[str]:
    """The fields of a config that describe its encoder, without those that every config of transformers has."""
    return config.to_dict().keys() - PreTrainedConfig().to_dict().keys()


def check_keywords(caller: str, names: Iterable[str], accepted: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raise for unknown arguments.

    Args:
        caller: name of the function, for the message.
        names: names of arguments.
        accepted: names that the caller takes.
        others: further names that may have been meant.

    Raises:
        TypeError: an unknown argument; the message suggests similar names.
    """
    for name in names:
        if name not in accepted:
            raise TypeError(f"{caller}: got an unexpected argument {name!r}{did_you_mean(name, {*accepted, *others})}")


def config_classes(cls: type[PackedEncoder]) -> tuple[Any, ...]:
    """The configs that an encoder takes: its `config_class` first, then those of its subclasses in the same module.

    A subclass without a `config_class` of its own takes those of the class that it derives from.
    """
    owner = [each for each in cls.__mro__ if getattr(each, "config_class", None) is cls.config_class][-1]
    variants = (each for each in owner.__subclasses__() if each.__module__ == owner.__module__)
    return tuple(each.config_class for each in (owner, *variants))


def check_config_class(cls: type[PackedEncoder], config: Any) -> None:
    """Check that a config is of a class that the encoder takes.

    Raises:
        TypeError: another class; transformers' config classes lack the fields that packing adds.
    """
    classes = config_classes(cls)
    if not isinstance(config, classes):
        names = [each.__name__ for each in classes]
        advice = f"; {names[0]}(**config.to_dict()) makes one" if isinstance(config, PreTrainedConfig) else ""
        raise TypeError(f"config: expected {' or '.join(names)}, got {type(config).__name__}{advice}")


def read_saving(directory: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """All arguments of `save_pretrained` by name, with transformers' defaults.

    Raises:
        TypeError: an argument that transformers does not have either; those of `push_to_hub` need `push_to_hub=True`.
    """
    signature = inspect.signature(PreTrainedModel.save_pretrained)
    bound = signature.bind(..., directory, *args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    del arguments["self"]
    further = arguments.pop("kwargs", {})
    if not arguments["push_to_hub"]:
        check_keywords("save_pretrained", further, (), signature.parameters.keys() - {"self", "kwargs"})
    return {**arguments, **further}
