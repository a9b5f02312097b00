"""OneVision-Encoder one image or clip at a time, plainly: the reference that packing is held against.

It shares nothing with `nopad`, and stands by itself so that tests can lay it beside a checkpoint as the code that the
checkpoint brings.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel


class PlainConfig(PreTrainedConfig):
    model_type = "onevision_encoder"

    hidden_size: int = 64
    intermediate_size: int = 48
    num_hidden_layers: int = 3
    num_attention_heads: int = 2
    num_channels: int = 3
    image_size: int = 28
    patch_size: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    layer_norm_type: str = "layer_norm"
    rope_theta: float = 10000.0
    rope_temporal_size: int | None = 64
    use_head: bool = True


def make_norm(config):
    kind = nn.RMSNorm if config.layer_norm_type == "rms_norm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x, angles):
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, angles), rotate(k, angles)
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


def rotate(x, angles):
    """Channel `c` turns by angle `c mod K / 2`, against its neighbour `c ± 1`."""
    channel = torch.arange(x.shape[-1], device=x.device)
    angle = angles[:, channel % angles.shape[1]].to(x.dtype)
    sign = torch.where(channel % 2 == 0, -1, 1)
    return x * angle.cos() + sign * x[..., channel ^ 1] * angle.sin()


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = make_norm(config)
        self.layer_norm2 = make_norm(config)
        self.mlp = Mlp(config)

    def forward(self, x, angles):
        x = x + self.self_attn(self.layer_norm1(x), angles)
        return (x + self.mlp(self.layer_norm2(x)),)


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x):
        mixed, _ = self.attention(self.probe.expand(len(x), -1, -1), x, x)
        return (mixed + self.mlp(self.norm(mixed)))[:, 0]


class Rope(nn.Module):
    """Frequencies of the three axes, in tables that are not saved."""

    def __init__(self, config):
        super().__init__()
        half = config.hidden_size // config.num_attention_heads // 2
        for axis, size in zip("thw", (half // 4, half * 3 // 8, half * 3 // 8), strict=True):
            frequencies = torch.tensor([1 / config.rope_theta ** (i / size) for i in range(size)], dtype=torch.float32)
            self.register_buffer(f"inv_freq_{axis}", frequencies, persistent=False)

    def forward(self, positions):
        tables = (self.inv_freq_t, self.inv_freq_h, self.inv_freq_w)
        return torch.cat([torch.outer(positions[:, i].float(), table) for i, table in enumerate(tables)], dim=1)


class PlainOneVision(PreTrainedModel):
    config_class = PlainConfig

    def __init__(self, config):
        super().__init__(config)
        size, patch = config.hidden_size, config.patch_size
        self.embeddings = nn.ModuleDict()
        self.embeddings["patch_embedding"] = nn.Conv2d(config.num_channels, size, patch, stride=patch, bias=False)
        self.layernorm_pre = make_norm(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        self.video_rope = Rope(config)
        self.layernorm_post = make_norm(config) if config.use_head else None
        self.head = Head(config) if config.use_head else None
        self.post_init()

    def forward(self, pixel_values, visible_indices=None, patch_positions=None):
        clip = pixel_values if pixel_values.ndim == 5 else pixel_values[:, :, None]
        maps = torch.stack([self.embeddings["patch_embedding"](frame) for frame in clip.unbind(2)], dim=2)
        _, _, frames, rows, columns = maps.shape
        if pixel_values.ndim == 5:
            frames = self.config.rope_temporal_size or frames
        grid = torch.cartesian_prod(*(torch.arange(n, device=maps.device) for n in (frames, rows, columns)))
        x = self.layernorm_pre(maps.flatten(2).transpose(1, 2))
        if visible_indices is not None:
            grid = grid[visible_indices[0]]
            x = x[:, visible_indices[0]]
        angles = self.video_rope(grid if patch_positions is None else patch_positions[0])
        for layer in self.encoder["layers"]:
            x = layer(x, angles)[0]
        if self.head is None:
            return BaseModelOutputWithPooling(last_hidden_state=x)
        x = self.layernorm_post(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=self.head(x))
