"""Perception Encoder one image at a time, plainly: the reference that packing is held against.

It shares nothing with `nopad`. Meta's own model, whose outputs are in the goldens, keeps queries, keys and values in
one matrix; here they are apart, as in `nopad.PEPacking`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel


class PlainPEConfig(PreTrainedConfig):
    model_type = "perception_encoder"

    hidden_size: int = 32
    intermediate_size: int = 48
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_channels: int = 3
    image_size: int = 22  # 5 × 5 patches and two pixels that no patch covers
    patch_size: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    use_class_token: bool = True
    use_layer_scale: bool = False
    use_final_norm: bool = True
    use_head: bool = True
    num_pooling_heads: int = 2
    projection_dim: int | None = None
    rope_theta: float = 10000.0
    rope_offset: int = 1


class Mlp(nn.Module):
    def __init__(self, config, inner):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, inner)
        self.activation = ACT2FN[config.hidden_act]
        self.c_proj = nn.Linear(inner, config.hidden_size)

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x, rotations):
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotations.to(part.dtype) @ part.unsqueeze(-1) for part in (q, k))
        weights = (q.squeeze(-1) @ k.squeeze(-1).transpose(2, 3) * v.shape[-1] ** -0.5).softmax(dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


def rotations_of(config, rows, columns):
    """`(tokens, K, K)`: each pair of neighbouring channels turns, half of the pairs by the column, half by the row."""
    size = config.hidden_size // config.num_attention_heads
    places = [(x + config.rope_offset, y + config.rope_offset) for y in range(rows) for x in range(columns)]
    places = [(0, 0)] * config.use_class_token + places
    quarter = size // 4
    turns = torch.zeros(len(places), size, size)
    for token, place in enumerate(places):
        for pair in range(size // 2):
            angle = torch.tensor(place[pair // quarter] * config.rope_theta ** (-(pair % quarter) / quarter))
            block = torch.stack((torch.stack((angle.cos(), -angle.sin())), torch.stack((angle.sin(), angle.cos()))))
            turns[token, 2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = block
    return turns


class LayerScale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.lambda1


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.attn = Attention(config)
        self.ln_1 = nn.LayerNorm(size, eps=eps)
        self.ln_2 = nn.LayerNorm(size, eps=eps)
        self.ls_1 = LayerScale(size) if config.use_layer_scale else None
        self.ls_2 = LayerScale(size) if config.use_layer_scale else None
        self.mlp = Mlp(config, config.intermediate_size)

    def forward(self, x, rotations):
        branch = self.attn(self.ln_1(x), rotations)
        x = x + (branch if self.ls_1 is None else self.ls_1(branch))
        branch = self.mlp(self.ln_2(x))
        return x + (branch if self.ls_2 is None else self.ls_2(branch))


class Pooling(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.probe = nn.Parameter(torch.zeros(1, 1, size))
        self.attn = nn.MultiheadAttention(size, config.num_pooling_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config, 4 * size)

    def forward(self, x):
        mixed, _ = self.attn(self.probe.expand(len(x), -1, -1), x, x)
        return (mixed + self.mlp(self.layernorm(mixed)))[:, 0]


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, self.side = config.hidden_size, config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(size)) if config.use_class_token else None
        self.patch_embedding = nn.Conv2d(config.num_channels, size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.use_class_token + self.side**2, size)

    def forward(self, pixels):
        x = self.patch_embedding(pixels)
        table = self.position_embedding.weight
        cls, table = table.split([len(table) - self.side**2, self.side**2])
        table = table.T.unflatten(1, (1, self.side, self.side)).transpose(0, 1)
        table = F.interpolate(table.float(), size=x.shape[2:], mode="bilinear").to(x.dtype)
        x = (x + table).flatten(2).transpose(1, 2)
        if self.class_embedding is None:
            return x
        return torch.cat(((self.class_embedding + cls).expand(len(x), -1, -1), x), dim=1)


class PlainPE(PreTrainedModel):
    config_class = PlainPEConfig

    def __init__(self, config):
        super().__init__(config)
        size, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = Embeddings(config)
        self.ln_pre = nn.LayerNorm(size, eps=eps)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.transformer = nn.ModuleDict({"resblocks": layers})
        self.ln_post = nn.LayerNorm(size, eps=eps) if config.use_final_norm else None
        self.attn_pool = Pooling(config) if config.use_head else None
        self.projection = nn.Linear(size, config.projection_dim, bias=False) if config.projection_dim else None
        self.post_init()

    def forward(self, pixel_values):
        x = self.ln_pre(self.embeddings(pixel_values))
        rows, columns = (side // self.config.patch_size for side in pixel_values.shape[2:])
        rotations = rotations_of(self.config, rows, columns).to(x.device)
        for layer in self.transformer["resblocks"]:
            x = layer(x, rotations)
        x = x if self.ln_post is None else self.ln_post(x)
        pooled = x[:, self.config.use_class_token :].mean(dim=1) if self.attn_pool is None else self.attn_pool(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)
