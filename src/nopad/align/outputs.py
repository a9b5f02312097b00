"""What both sides of an alignment return for images, one model after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nopad.align.metrics import ModelOutput
from nopad.align.reference_model import ReferenceModel
from nopad.encoder import PackedEncoder
from nopad.packing import Pack


def packed_outputs(packed: PackedEncoder, pixels: Sequence[Tensor]) -> list[ModelOutput]:
    """The packed encoder on all images in one pack, image by image."""
    frames = packed.temporal_patch_size
    pack = Pack.of(pixels, packed.patch_size, packed.patch_order, temporal_patch_size=frames)
    pack = pack.to(packed.device, packed.dtype)
    output = packed.encode(pack, output_hidden_states=True)
    hidden_states = output.hidden_states or ()
    if packed.compiled_capacity is not None:
        output = packed.encode(pack)  # with hidden states it runs as if it were not compiled
    lengths = pack.grid_thw.prod(dim=1).tolist()
    tokens = output.tokens.float().cpu().split(lengths)
    layers = [states.float().cpu().split(lengths) for states in hidden_states]
    pooled = output.pooled.float().cpu()
    return [ModelOutput(tokens[i], tuple(states[i] for states in layers), pooled[i]) for i in range(len(pixels))]


def reference_output(reference: ReferenceModel, model: Any, pixels: Tensor, together: bool) -> ModelOutput:
    """The reference on an image or a clip: as a whole where the encoder takes frames `together`, else each frame."""
    tokens, layers_of_frames, pooled = [], [], []
    for frame in pixels if pixels.ndim == 4 and not together else pixels[None]:
        hidden_states: list[Tensor] = []
        layers = reference.layers(model)

        def before(layer: Any, arguments: Any, into: list[Tensor] = hidden_states) -> None:
            into.append(arguments[0])

        def after(layer: Any, arguments: Any, output: Any, into: list[Tensor] = hidden_states) -> None:
            into.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_pre_hook(before) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(after))
        try:
            of_frame, vector = reference.run(model, frame.to(model.device, model.dtype))
        finally:
            for hook in hooks:
                hook.remove()
        tokens.append(of_frame)
        layers_of_frames.append([reference.layer_tokens(model, states, frame) for states in hidden_states])
        pooled += [] if vector is None else [vector]
    return ModelOutput(
        torch.cat(tokens).float().cpu(),
        tuple(torch.cat(frames).float().cpu() for frames in zip(*layers_of_frames, strict=True)),
        torch.stack(pooled).float().mean(dim=0).cpu() if pooled else None,
    )
