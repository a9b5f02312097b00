"""`PackedEncoder`: the base class of all families."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from nopad.arguments import check_output, read_arguments
from nopad.checkpoints.keywords import check_config_class, check_keywords
from nopad.checkpoints.strict import check_values
from nopad.encoder.execution import Execution
from nopad.encoder.images import ImageRules
from nopad.encoder.sizes import Sizes
from nopad.encoder.stored import Stored
from nopad.inference.collect import packed_output
from nopad.inference.compile import current_runner
from nopad.inference.runner import EagerRunner, Runner
from nopad.inspection.attention import attention_maps
from nopad.inspection.layers import LayerRunner, check_layers, features_and_output, layer_features
from nopad.layers.attention import Rope
from nopad.layers.linear import stack_weights
from nopad.layers.pooling import segment_mean
from nopad.layers.position_table import example_positions
from nopad.layers.prefix import PrefixLayout
from nopad.layers.roles import RoleAliases
from nopad.layout import Layout
from nopad.outputs import PackedOutput, Trunk
from nopad.packing import Pack
from nopad.patches import check_patch_order
from nopad.pipeline.images import embed_images, pack_images
from nopad.segments import Segments
from nopad.text.rules import TextRules
from nopad.text.similarity import classify, embed_text, similarity
from nopad.training.checkpointing import (
    activation_checkpointing_disable,
    activation_checkpointing_enable,
    checkpoint_mlps,
)
from nopad.training.compiled import TrainingRunner, compile_for_training
from nopad.training.finetuning import lora_targets, parameter_groups
from nopad.training.frozen import freeze_mask_tokens


class PackedEncoder(RoleAliases, Execution, Sizes, ImageRules, Stored):
    """A vision encoder over packs: any mix of image and video sizes in one forward, nothing padded.

    The constructor takes a config, or a checkpoint as `from_pretrained` does. docs/adding-a-family.md lists what a
    family brings. Methods that take more than a line to explain are functions of other modules. How the layers
    run is in `Execution`, and what no forward needs in `Sizes`, `ImageRules` and `Stored`, whose attributes an encoder
    has as well.

    Attributes:
        frames_attend_jointly: a whole clip is one segment, not each of its frames.
        num_prefix_tokens: CLS and register tokens in front of each segment.
        embeddings: patches to tokens; its `proj` is the patches' GEMM.
        layers: the transformer blocks.
        head: pools tokens and segments to one vector per segment, `None` where the checkpoint has no head.
        head_reads_prefix: whether it pools CLS and register tokens as well.
        projection: pooled vectors to the image-text space, `None` where the checkpoint has no projection.
        merger: merges blocks of tokens for a language model, `None` where the checkpoint has no merger.
        deepstack_layers: indices of the layers whose tokens are merged as well, in order; empty for most.
        deepstack_mergers: the merger of each of these layers.
        text_rules: how the family's text towers take texts, `None` where it has none.
    """

    main_input_name = "hidden_states"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    config: Any
    frames_attend_jointly: ClassVar[bool] = False
    head_reads_prefix: ClassVar[bool] = False
    text_rules: ClassVar[TextRules | None] = None
    num_prefix_tokens: int
    embeddings: Any
    layers: nn.ModuleList
    head: nn.Module | None
    projection: nn.Linear | None
    merger: nn.Module | None
    deepstack_layers: tuple[int, ...] = ()
    deepstack_mergers: Sequence[nn.Module] = ()

    def __new__(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Each config has a class of its own, as transformers' `AutoModel.register` expects."""
        encoder_class: Any = _class_for(cls, config)
        return super().__new__(encoder_class)

    def __init__(self, config: PreTrainedConfig | str | Path, **kwargs: Any):
        if not isinstance(config, PreTrainedConfig):
            loaded = type(self).from_pretrained(config, **kwargs)
            self.__class__, self.__dict__ = type(loaded), loaded.__dict__
            return
        check_keywords(type(self).__name__, kwargs, ())
        check_config_class(type(self), config)
        super().__init__(config)
        check_values(config, type(config).__name__)
        check_patch_order(config.patch_order)
        self.head = self.projection = self.merger = None
        self.num_prefix_tokens = self.count_prefix_tokens(config)
        self.build()
        whole = (self.embeddings, *self.layers, self.head, self.merger)  # `device_map` keeps each on one device
        self._no_split_modules = {type(module).__name__ for module in whole if module is not None}
        self.post_init()
        freeze_mask_tokens(self)
        stack_weights(self)

    # Defined by a family.

    def build(self) -> None:
        """Make the modules that `self.config` describes."""
        raise NotImplementedError

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches `(T, P)` to normed tokens; embeds and runs `self.layers` by the `runner`."""
        raise NotImplementedError

    @staticmethod
    def count_prefix_tokens(config: Any) -> int:
        """CLS and register tokens in front of each segment."""
        return 0

    def pool_segments(self, trunk: Trunk, segments: Segments) -> Tensor:
        """One vector per segment, `(S, D)`: by `head`, else the first prefix token, else the mean of the patches."""
        if self.head is not None:
            return self.head(*self.head_input(trunk, segments))
        return segment_mean(trunk.tokens, segments) if trunk.prefix_tokens is None else trunk.prefix_tokens[:, 0]

    def head_input(self, trunk: Trunk, segments: Segments) -> tuple[Tensor, Segments]:
        """The tokens that `head` pools, with the prefix tokens in front where it reads them, and their segments."""
        if not self.head_reads_prefix or trunk.prefix_tokens is None:
            return trunk.tokens, segments
        prefix_layout = PrefixLayout.of_segments(segments, segments.index(), trunk.prefix_tokens.shape[1])
        return prefix_layout.join(trunk.tokens, trunk.prefix_tokens), prefix_layout.segments

    def norm_trunk(self, trunk: Trunk) -> Trunk:
        """The final norm, of tokens that are not normed yet; as they are where the model has none."""
        norm: Any = self.norm
        if norm is None:
            return trunk
        return Trunk(norm(trunk.tokens), None if trunk.prefix_tokens is None else norm(trunk.prefix_tokens))

    def example_rope(self, rows: int) -> Rope | None:
        """Rotary embedding as `trunk` makes it for `rows` rows; `None` where the model has none."""
        return None

    def example_segments(self, length: int) -> Segments:
        """One segment of so many rows, as `trunk` makes it."""
        return Segments.of([length], self.device)

    def patch_rows(self, layout: Layout) -> Tensor | None:
        """Row of each patch in the layers, `(T,)`; `None` where rows are the patches in their order."""
        if not self.num_prefix_tokens:
            return None
        return PrefixLayout.of(layout, self.num_prefix_tokens).patches

    def example_positions(self) -> Tensor | None:
        """Learned positions of one image, for `compile` to warm up with; `None` where there are none."""
        return example_positions(self.embeddings, self.device)

    # The contract of a forward.

    def forward(
        self,
        hidden_states: Tensor | Pack,
        grid_thw: Tensor | None = None,
        patch_positions: Tensor | None = None,
        *,
        output: Literal["tokens", "all"] = "tokens",
        output_hidden_states: bool = False,
        output_deepstack: bool = False,
    ) -> Tensor | PackedOutput:
        """Patches to tokens, all images and clips of the pack in one pass.

        Args:
            hidden_states: `(T, P)` patches, or a whole `Pack` instead of all three arguments.
            grid_thw: `(N, 3)` integers `[frames, rows, columns]`, on the CPU or the device of the patches.
            patch_positions: `(T, 3)` integers `[t, h, w]` of each patch where they are not the full grid;
                then a grid row is `(1, 1, patches kept)`.
            output: `"all"` for pooled vectors, projections, prefix and merged tokens as well.
            output_hidden_states: with `"all"`, every layer's tokens, too.
            output_deepstack: with `"all"`, the merged tokens of the DeepStack layers, too.

        Returns:
            `(T, D)` patch tokens after the final norm, in the order of the patches; with `"all"` a `PackedOutput`.

        Raises:
            ValueError: arguments that do not fit each other or this model.
        """
        check_output(self, output, hidden_states=output_hidden_states, deepstack=output_deepstack)
        patches, layout = read_arguments(self, hidden_states, grid_thw, patch_positions)
        states: list[Tensor] | None = [] if output_hidden_states else None
        deepstack: list[Tensor] | None = [] if output_deepstack else None
        runner = self._runner_for(layout, states, deepstack)
        # Non-torch kernels launch on the current device; torch's compiler sees to that itself.
        with torch.cuda.device_of(patches) if patches.is_cuda and not torch.compiler.is_compiling() else nullcontext():
            trunk = self.trunk(patches, layout, runner).to(patches.device)  # wherever its last part is
            if output == "tokens":
                return trunk.tokens
            if states is not None and deepstack is not None:
                deepstack += [states[layer + 1] for layer in self.deepstack_layers]
            return packed_output(self, trunk, layout, runner, states, deepstack)

    def encode(
        self,
        hidden_states: Tensor | Pack,
        grid_thw: Tensor | None = None,
        patch_positions: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_deepstack: bool = False,
    ) -> PackedOutput:
        """The forward with `output="all"`: pooling, projection, prefix and merged tokens.

        On request also every layer's tokens, and the merged tokens of the DeepStack layers.

        It calls the encoder itself, so that hooks on its forward (FSDP2, accelerate) run. What holds the encoder as a
        module (DDP, FSDP1) is to be called instead: `ddp(pack, output="all")`. `ddp.module.encode` would go around it,
        and gradients would differ from rank to rank.
        """
        options: dict[str, Any] = {"output_hidden_states": output_hidden_states, "output_deepstack": output_deepstack}
        return self(hidden_states, grid_thw, patch_positions, output="all", **options)

    def segments_of(self, layout: Layout) -> Segments:
        """Segments of a pack: whole clips or their frames."""
        return layout.images if self.frames_attend_jointly else layout.frames

    def _runner_for(self, layout: Layout, states: list[Tensor] | None, deepstack: list[Tensor] | None) -> Runner:
        """The runner of this pack, which alone determines whether it is padded; it fills the lists that are given."""
        if deepstack is not None and states is None:
            return LayerRunner(dict.fromkeys(self.deepstack_layers, deepstack.append), whole=True)
        if torch.compiler.is_exporting():
            return EagerRunner(states)
        segments = len(self.segments_of(layout))
        rows = layout.num_patches + self.num_prefix_tokens * segments
        if states is not None:
            if isinstance(self._runner, TrainingRunner) and self._runner.accepts(rows, segments):
                return self._runner.collecting(states)
            return EagerRunner(states)
        return current_runner(self) if self._runner.accepts(rows, segments) else EagerRunner()

    # Training.

    compile_for_training = compile_for_training
    checkpoint_mlps = checkpoint_mlps
    activation_checkpointing_enable: Any = activation_checkpointing_enable
    activation_checkpointing_disable: Any = activation_checkpointing_disable
    parameter_groups = parameter_groups
    lora_targets = property(lora_targets)

    # Images, and what the layers make of them.

    pack = pack_images
    embed = embed_images
    features = layer_features
    attention = attention_maps
    attention_maps = attention_maps
    features_and_output = features_and_output
    layer_indices = check_layers

    # Texts, where the checkpoint has both towers.

    embed_text = embed_text
    similarity = similarity
    classify = classify

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.embeddings.proj


def _class_for(cls: type[PackedEncoder], config: Any) -> type[PackedEncoder]:
    """The subclass of a family for a config that is not its `config_class`; subclasses of others stay themselves."""
    classes: list[Any] = [each for each in (cls, *cls.__subclasses__()) if each.__module__ == cls.__module__]
    matches = (each for each in classes if isinstance(config, each.config_class))
    return next(matches, cls) if "family" in vars(cls) else cls
