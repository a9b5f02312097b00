"""What the vision encoders of Qwen's language models share: patches of two frames, rope, blocks that are merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nopad.encoder import PackedEncoder
from nopad.inference.runner import Runner
from nopad.layers.attention import Rope
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.rope import angles_along_axes, apply_rotary
from nopad.layout import Layout
from nopad.preprocessing.rules import Preprocessing


class QwenVLEmbeddings(nn.Module):
    """Patches of several frames to tokens: a three-dimensional convolution as one linear map.

    Args:
        config: has the sizes of a patch.
        hidden_size: D.
        bias: whether the convolution has a bias.
    """

    def __init__(self, config: Any, hidden_size: int, *, bias: bool):
        super().__init__()
        size, frames, order = config.patch_size, config.temporal_patch_size, config.patch_order
        self.proj = PatchEmbedding(config.in_channels, hidden_size, size, order, temporal_patch_size=frames, bias=bias)

    def forward(self, patches: Tensor, runner: Runner) -> Tensor:
        """`(T, P)` to `(T, D)`."""
        return runner.embed(self.proj, patches)


class QwenVLEncoder(PackedEncoder):
    """Base class: a clip's frames are separate segments, two by two, and tokens are not normed."""

    config_without_head = "has its merger in the original, too"
    names: Mapping[str, str] = {"embeddings": "patch_embed", "layers": "blocks"}
    norm = None

    def rope(self, coordinates: Tensor) -> Rope:
        """Rotary embedding over row and column of `[t, h, w]`, half of the angles each."""
        theta, sizes = self.config.rope_parameters["rope_theta"], (self._head_dim // 4,) * 2
        angles = angles_along_axes(coordinates[:, 1:], sizes, theta)[:, None]
        return Rope(apply_rotary, angles.cos(), angles.sin())

    def example_rope(self, rows: int) -> Rope:
        """Rotary embedding of `rows` patches in a row."""
        return self.rope(Layout.of_image(1, rows, self.device).coordinates)

    @classmethod
    def read_preprocessing(
        cls, config: Any, preprocessor_config: Mapping[str, Any] | None, source: str | None
    ) -> Preprocessing:
        """See `PackedEncoder.read_preprocessing`.

        Raises:
            ValueError: also patches or blocks of other sizes than the encoder's.
        """
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            value = (preprocessor_config or {}).get(name)
            expected = getattr(config, name.replace("merge_size", "spatial_merge_size"))
            if value not in (None, expected):
                raise ValueError(
                    f"checkpoint {source!r}: preprocessor config: {name}: expected {expected} as in config.json, got "
                    f"{value!r:.80}"
                )
        return super().read_preprocessing(config, preprocessor_config, source)
