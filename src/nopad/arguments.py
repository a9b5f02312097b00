"""Checks of the arguments of a forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nopad.counts import counted
from nopad.inference.dispatch import is_dispatched
from nopad.inference.precision import check_inference
from nopad.kernels.tracing import run_untraced
from nopad.layout import Layout
from nopad.packing import Pack
from nopad.traced import TracedLayout

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def check_output(encoder: PackedEncoder, output: str, *, hidden_states: bool, deepstack: bool) -> None:
    """Check what a forward is to return.

    Raises:
        ValueError: an unknown `output`, options that it does not have, or DeepStack of a model without it.
    """
    if output not in ("tokens", "all") or ((hidden_states or deepstack) and output != "all"):
        raise ValueError(
            "output: expected 'tokens', or 'all', which output_hidden_states and output_deepstack need; got "
            f"{output!r} with output_hidden_states={hidden_states} and output_deepstack={deepstack}"
        )
    if deepstack and not encoder.deepstack_layers:
        raise ValueError(f"output_deepstack: expected False, since this {encoder.family} model has no DeepStack layers")


def read_arguments(
    encoder: PackedEncoder,
    hidden_states: Tensor | Pack,
    grid_thw: Tensor | None,
    patch_positions: Tensor | None,
) -> tuple[Tensor, Layout]:
    """Check the arguments of `PackedEncoder.forward` and read the grid.

    Returns:
        The patches `(T, P)` and where they lie.

    Raises:
        ValueError: arguments that do not fit each other or this encoder.
    """
    if isinstance(hidden_states, Pack):
        if grid_thw is not None or patch_positions is not None:
            raise ValueError("hidden_states: a Pack brings its own grid_thw and patch_positions; give it alone")
        _check_pack(encoder, hidden_states)
        pack = hidden_states
        hidden_states, grid_thw, patch_positions = pack.hidden_states, pack.grid_thw, pack.patch_positions
    elif not isinstance(hidden_states, Tensor) or hidden_states.ndim > 2:
        got = f"shape {tuple(hidden_states.shape)}" if isinstance(hidden_states, Tensor) else _kind(hidden_states)
        raise ValueError(
            f"hidden_states: expected patches (T, {encoder.patch_dim}) or a Pack, got {got}; images go through "
            f"encoder.pack(images), normalised pixels through nopad.Pack.of; encoder.embed(images) returns vectors"
        )
    if grid_thw is None:
        raise ValueError("grid_thw: expected (N, 3) integers beside hidden_states, got None")
    for name, tensor in {"grid_thw": grid_thw, "patch_positions": patch_positions}.items():
        if not isinstance(tensor, Tensor) and (name, tensor) != ("patch_positions", None):
            raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if hidden_states.device != encoder.device and hidden_states.device.type != "meta" and is_dispatched(encoder):
        # accelerate has moved all arguments to one of its devices, which need not be that of the patch embedding.
        hidden_states, grid_thw = hidden_states.to(encoder.device), grid_thw.cpu()
        patch_positions = None if patch_positions is None else patch_positions.to(encoder.device)
    if encoder.device.type != "meta" and hidden_states.device != encoder.device:
        raise ValueError(
            f"hidden_states: expected on {encoder.device} like the patch embedding, got {hidden_states.device}"
        )
    if hidden_states.dtype != encoder.dtype and not torch.is_autocast_enabled(hidden_states.device.type):
        raise ValueError(f"hidden_states: expected {encoder.dtype} like the weights, got {hidden_states.dtype}")
    if encoder.precision is not None:
        check_inference(encoder, hidden_states)
    arguments = hidden_states, grid_thw, patch_positions, encoder.patch_dim
    layout: Any
    if torch.compiler.is_exporting():
        layout = TracedLayout(*arguments)
    else:
        layout = run_untraced(Layout.read, *arguments)  # the one host read
    return hidden_states, layout


def _kind(value: object) -> str:
    """`"list of JpegImageFile"`."""
    of = f" of {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else ""
    return f"{type(value).__name__}{of}"


def _check_pack(encoder: PackedEncoder, pack: Pack) -> None:
    if (pack.patch_size, pack.patch_order) != (encoder.patch_size, encoder.patch_order):
        raise ValueError(
            f"pack: made with patch_size {pack.patch_size} and patch_order {pack.patch_order!r}, but this encoder "
            f"takes {encoder.patch_size} and {encoder.patch_order!r}; make it with this encoder's pack()"
        )
    if pack.temporal_patch_size != encoder.temporal_patch_size:
        raise ValueError(
            f"pack: made with temporal_patch_size {pack.temporal_patch_size}, but this encoder takes patches of "
            f"{counted(encoder.temporal_patch_size, 'frame')}; make it with this encoder's pack(), or by "
            f"Pack.of(…, temporal_patch_size={encoder.temporal_patch_size})"
        )
    if pack.mean is None:
        return
    expected = encoder.preprocessing
    if (pack.mean, pack.std) != (expected.mean, expected.std):
        raise ValueError(
            f"pack: normalised with mean {pack.mean} and std {pack.std}, but this encoder takes {expected.mean} and "
            f"{expected.std}; make it with this encoder's pack()"
        )
