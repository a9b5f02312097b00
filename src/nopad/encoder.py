"""What all packed encoders share: the contract of a forward, and getting ready for inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nopad.inference import precision as formats
from nopad.inference.compile import compile_layers
from nopad.inference.runner import EagerRunner, Runner, StaticRunner
from nopad.layers.attention import Rope
from nopad.layers.pooling import segment_mean
from nopad.layers.prefix import PrefixLayout
from nopad.layout import Layout
from nopad.packing import Pack
from nopad.pictures import PictureEncoder
from nopad.pipeline.worker import CAPACITY
from nopad.segments import Segments


@dataclass(frozen=True)
class PackedOutput:
    """Everything that an encoder tells about a pack.

    Attributes:
        tokens: `(T, D)` patch tokens after the final norm, in the order of the patches.
        pooled: `(N, D)` one vector per image or clip.
        image_embeds: `(N, E)` `pooled` in the image-text space, `None` where the checkpoint has no projection.
        prefix_tokens: `(S, number, D)` CLS and register tokens after the final norm, `None` where there are none.
        hidden_states: on request the `(T, D)` tokens before the first layer and after each, without the final norm.
    """

    tokens: Tensor
    pooled: Tensor
    image_embeds: Tensor | None
    prefix_tokens: Tensor | None
    hidden_states: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Trunk:
    """What a family's layers give, before pooling."""

    tokens: Tensor
    prefix_tokens: Tensor | None = None


class PackedEncoder(PictureEncoder):
    """A vision encoder over packs: any mix of image and video sizes in one forward, nothing padded.

    A family says what it is (`build`, `trunk`, and what `PretrainedEncoder` asks for); this class is the contract
    around it. The constructor takes a config, or a checkpoint as `from_pretrained` does.

    Attributes:
        layers: the transformer blocks.
        head: pools tokens and segments to one vector per segment, `None` where the checkpoint has no head. A family
            that pools otherwise needs none; it overrides `pool_segments`.
    """

    main_input_name = "hidden_states"
    frames_attend_jointly: ClassVar[bool] = False
    num_prefix_tokens: int = 0
    layers: nn.ModuleList
    head: nn.Module | None
    _runner: Runner = EagerRunner()

    # What a family brings.

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches `(T, P)` to normed tokens; embeds and runs `self.layers` by the `runner`."""
        raise NotImplementedError

    def pool_segments(self, trunk: Trunk, segments: Segments) -> Tensor:
        """One vector per segment, `(S, D)`: by the `head` where there is one, else the mean of its patch tokens."""
        return segment_mean(trunk.tokens, segments) if self.head is None else self.head(trunk.tokens, segments)

    def project(self, pooled: Tensor) -> Tensor | None:
        """`pooled` in the image-text space, `None` where the checkpoint has no projection."""
        return None

    # The contract of a forward.

    def forward(
        self, hidden_states: Tensor | Pack, grid_thw: Tensor | None = None, patch_positions: Tensor | None = None
    ) -> Tensor:
        """Patches to tokens, all images and clips of the pack in one pass.

        Args:
            hidden_states: `(T, P)` patches, or a whole `Pack` instead of all three arguments.
            grid_thw: `(N, 3)` integers `[frames, rows, columns]`, on the CPU or the device of the patches.
            patch_positions: `(T, 3)` integers `[t, h, w]` of each patch where they are not the full grid;
                then a grid row is `(1, 1, patches kept)`.

        Returns:
            `(T, D)` patch tokens after the final norm, in the order of the patches.

        Raises:
            ValueError: arguments that do not fit each other or this model.
        """
        patches, layout = self._read(hidden_states, grid_thw, patch_positions)
        with torch.cuda.device_of(patches):  # non-torch kernels launch on the current device
            return self.trunk(patches, layout, self._runner_for(layout)).tokens

    def encode(
        self,
        hidden_states: Tensor | Pack,
        grid_thw: Tensor | None = None,
        patch_positions: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> PackedOutput:
        """As `forward`, with pooling, projection, prefix tokens and, on request, every layer's tokens."""
        patches, layout = self._read(hidden_states, grid_thw, patch_positions)
        runner, states = self._runner_for(layout), None
        if output_hidden_states:
            states = []
            runner = EagerRunner(states)
        with torch.cuda.device_of(patches):
            trunk = self.trunk(patches, layout, runner)
            pooled = runner.pool(self, trunk, self._segments(layout))
            if len(pooled) > len(layout.images):
                pooled = segment_mean(pooled, layout.frames_per_image)
            projected = runner.project(self, pooled)
            kept = None if states is None else self._of_patches(states, layout)
        return PackedOutput(trunk.tokens, pooled, projected, trunk.prefix_tokens, kept)

    def _segments(self, layout: Layout) -> Segments:
        """What attends to itself: whole clips or their frames."""
        return layout.images if self.frames_attend_jointly else layout.frames

    def _runner_for(self, layout: Layout) -> Runner:
        """What runs this pack; nothing else decides whether it is filled up."""
        segments = len(self._segments(layout))
        rows = layout.num_patches + self.num_prefix_tokens * segments
        return self._runner if self._runner.admits(rows, segments) else EagerRunner()

    def _of_patches(self, states: list[Tensor], layout: Layout) -> tuple[Tensor, ...]:
        """Each layer's tokens `(T, D)`, without prefix tokens."""
        if not self.num_prefix_tokens:
            return tuple(states)
        places = PrefixLayout.of(layout, self.num_prefix_tokens)
        return tuple(places.take_patches(state) for state in states)

    # Ready for inference.

    def compile(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, capacity: int = CAPACITY, max_segments: int | None = None, *, compiled: bool = True
    ) -> None:
        """Compile the layers, one by one, for packs of one shape; all warm-up is done here.

        From then on inference fills each pack up to `capacity` rows. One graph serves every pack, and an image's
        features are the same bits whatever it is packed with, on one device kind, in one version, for one capacity.
        Packs that do not fit, training, and `output_hidden_states` run as before `compile`. Without Triton or a C++
        compiler packs are filled up as well, and a warning says that their layers are not compiled. Threads, and
        streams of a GPU, may share the encoder; its layers take one pack at a time.

        Weights may change: what was folded from them is folded anew. Two changes leave no trace and go unnoticed: a
        write through `.data`, and another `eps` of a norm. Layers that have hooks, other parts than before, or dropout
        in training run as they are, on `capacity` rows. On a GPU, where norms are LayerNorms, `norm` gets tokens less
        their mean, which it would take away itself.

        Args:
            capacity: tokens of a pack, prefix tokens among them.
            max_segments: maximum number of segments of a pack: images, clips, or frames that do not attend to each
                other. `capacity // 64` by default.
            compiled: `False` fills packs up and leaves the layers as they are.

        Raises:
            ValueError: a capacity that holds no image, or `max_segments` below 1.
        """
        self.uncompile()
        max_segments = max(1, capacity // 64) if max_segments is None else max_segments
        if capacity <= self.num_prefix_tokens or max_segments < 1:
            min_capacity = self.num_prefix_tokens + 1
            raise ValueError(
                f"expected capacity ≥ {min_capacity} and max_segments ≥ 1, got {capacity} and {max_segments}"
            )
        on_device = torch.cuda.device_of(next(self.parameters()))
        with on_device, torch.inference_mode(False), torch.no_grad():  # or nothing made here could be written to later
            layers = compile_layers(self, capacity, max_segments, compiled)
            self._runner = StaticRunner(self, capacity, max_segments, layers)

    def set_attention(self, backend: str) -> None:
        """As `PretrainedEncoder.set_attention`; undoes `compile`, whose layers keep the kernel they were made with."""
        super().set_attention(backend)
        self.uncompile()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.uncompile()  # what is moved or cast has to be compiled for its new place
        return super()._apply(fn, recurse)

    def to_precision(self, precision: str) -> None:
        """Turn the weights of the layers into another format, for inference alone; see `nopad.load`.

        From then on parameters ask for no gradient, and training and saving are refused. `to` still moves them, and
        casts only what is not in that format.

        Raises:
            ValueError: an unknown format, sizes that it does not take, or a dtype other than bfloat16 on a GPU.
        """
        formats.convert(self, precision)
        self.uncompile()
        self.precision = precision

    def uncompile(self) -> None:
        """Undo `compile`."""
        self._runner = EagerRunner()

    @property
    def compiled_capacity(self) -> int | None:
        """Tokens that every pack is filled up to, `None` unless compiled."""
        return self._runner.capacity

    @property
    def compiled_max_segments(self) -> int | None:
        """Maximum number of segments of a compiled pack, `None` unless compiled."""
        return self._runner.max_segments

    @property
    def execution(self) -> str:
        """How the layers run in inference: `"eager"`, `"compiled"`, `"fused by quack"` or `"fused by torch"`."""
        return self._runner.execution(self.layers)

    def example_rope(self, rows: int) -> Rope | None:
        """Rotary embedding as `trunk` makes it for `rows` rows; `None` where the model has none."""
        return None

    def example_positions(self) -> Tensor | None:
        """Positions of one image, as `trunk` adds them, for `compile` to warm up with; `None` where it adds none."""
        return None

    def _read(
        self, hidden_states: Tensor | Pack, grid_thw: Tensor | None, patch_positions: Tensor | None
    ) -> tuple[Tensor, Layout]:
        """Check the arguments and read the grid: everything about them that can be wrong is found here."""
        if isinstance(hidden_states, Pack):
            if grid_thw is not None or patch_positions is not None:
                raise ValueError("hidden_states: a Pack brings its own grid_thw and patch_positions; give it alone")
            self._check_pack(hidden_states)
            pack = hidden_states
            hidden_states, grid_thw, patch_positions = pack.hidden_states, pack.grid_thw, pack.patch_positions
        if grid_thw is None:
            raise ValueError("grid_thw: expected (N, 3) integers beside hidden_states, got None")
        given = {"hidden_states": hidden_states, "grid_thw": grid_thw, "patch_positions": patch_positions}
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor) and (name, tensor) != ("patch_positions", None):
                raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        weight = next(self.parameters())
        if weight.device.type != "meta" and hidden_states.device != weight.device:
            raise ValueError(f"hidden_states: expected on {weight.device} like the weights, got {hidden_states.device}")
        if hidden_states.dtype != self.dtype and not torch.is_autocast_enabled(hidden_states.device.type):
            raise ValueError(f"hidden_states: expected {self.dtype} like the weights, got {hidden_states.dtype}")
        if self.precision is not None:
            formats.check_inference(self, hidden_states)
        return hidden_states, Layout.read(hidden_states, grid_thw, patch_positions, self.patch_dim)

    def _check_pack(self, pack: Pack) -> None:
        if (pack.patch_size, pack.patch_order) != (self.patch_size, self.patch_order):
            raise ValueError(
                f"pack: made with patch_size {pack.patch_size} and patch_order {pack.patch_order!r}, but this encoder "
                f"takes {self.patch_size} and {self.patch_order!r}; make it with this encoder's pack()"
            )
        own = self.preprocessing
        if pack.mean is not None and (pack.mean, pack.std) != (own.mean, own.std):
            raise ValueError(
                f"pack: normalised with mean {pack.mean} and std {pack.std}, but this encoder takes {own.mean} and "
                f"{own.std}; make it with this encoder's pack()"
            )
