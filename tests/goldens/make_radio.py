"""Writes the golden cases `radio-*`: tiny checkpoints under NVIDIA's names, and what timm's own C-RADIO makes of them.

pip install timm==1.0.31 torch==2.13.0 torchvision==0.28.0 safetensors
python tests/goldens/make_radio.py tests/goldens
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models.naflexvit import checkpoint_filter_fn

WIDTH, DEPTH, HEADS, PATCH, SIDE, MLP = 32, 2, 4, 4, 6, 48
GRIDS = [(5, 5), (3, 7), (1, 8), (6, 6), (9, 2)]
CASES = {
    "radio-v3": ("naflexvit_base_patch16_radio_v3", "c-radio_v3-b", 4, 4, True),
    "radio-v4": ("naflexvit_huge_patch16_radio_v4", "c-radio_v4-h", 3, 7, False),
}
"""timm's architecture, NVIDIA's version, numbers of CLS and of register tokens, whether blocks have layer scales."""


def checkpoint(num_prefix_tokens: int, summary: list[int], scales: bool) -> dict[str, torch.Tensor]:
    """Random tensors under NVIDIA's names."""
    generator = torch.Generator().manual_seed(0)

    def vector(size: int) -> torch.Tensor:
        return 1.0 + 0.2 * torch.randn(size, generator=generator)

    def matrix(*shape: int) -> torch.Tensor:
        return 1.5 * shape[-1] ** -0.5 * torch.randn(shape, generator=generator)

    model = "radio_model.model"
    state = {
        "radio_model.summary_idxs": torch.tensor(summary),
        "radio_model.input_conditioner.norm_mean": 0.2 + 0.5 * torch.rand(3, 1, 1, generator=generator),
        "radio_model.input_conditioner.norm_std": 0.2 + 0.1 * torch.rand(3, 1, 1, generator=generator),
        f"{model}.patch_generator.embedder.weight": matrix(WIDTH, 3 * PATCH**2),
        f"{model}.patch_generator.pos_embed": matrix(1, SIDE**2, WIDTH),
        f"{model}.patch_generator.cls_token.token": matrix(num_prefix_tokens, WIDTH),
    }
    if scales:  # of timm's architecture with registers, which NVIDIA's does not compute with
        state[f"{model}.reg_token"] = matrix(1, 4, WIDTH)
    for layer in range(DEPTH):
        block = f"{model}.blocks.{layer}"
        linears = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        linears |= {"mlp.fc1": (MLP, WIDTH), "mlp.fc2": (WIDTH, MLP)}
        state |= {f"{block}.{name}.weight": matrix(*shape) for name, shape in linears.items()}
        state |= {f"{block}.{name}.bias": vector(shape[0]) for name, shape in linears.items()}
        state |= {f"{block}.{name}.{kind}": vector(WIDTH) for name in ("norm1", "norm2") for kind in ("weight", "bias")}
        if scales:
            state |= {f"{block}.{name}.grandma": vector(WIDTH) for name in ("ls1", "ls2")}
    return state


def config(version: str, num_cls_tokens: int, summary: list[int]) -> dict:
    """NVIDIA's `config.json`, as far as it is about the model, and the heads, which it has by the model's name."""
    teachers = [{"name": f"teacher {i}", "use_summary": i in summary} for i in range(num_cls_tokens)]
    return {
        "architectures": ["RADIOModel"],
        "args": {"cls_token_per_teacher": True, "cpe_max_size": SIDE * PATCH, "teachers": teachers},
        "max_resolution": SIDE * PATCH,
        "num_attention_heads": HEADS,
        "patch_size": PATCH,
        "torch_dtype": "float32",
        "version": version,
    }


def main(folder: Path) -> None:
    """Write all cases."""
    for name, (architecture, version, num_cls_tokens, num_registers, scales) in CASES.items():
        number, summary = num_cls_tokens + num_registers, [*range(num_cls_tokens - 1)]
        state = checkpoint(number, summary, scales)
        sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": MLP / WIDTH}
        options = {"patch_size": PATCH, "pos_embed_grid_size": (SIDE, SIDE), "reg_tokens": number - 1}
        model = timm.create_model(architecture, pretrained=False, **sizes, **options).eval()
        model.load_state_dict(checkpoint_filter_fn(dict(state), model))
        generator = torch.Generator().manual_seed(1)
        inputs, expected = {}, {}
        for i, (rows, columns) in enumerate(GRIDS):
            image = torch.rand(1, 3, PATCH * rows, PATCH * columns, generator=generator)
            mean, std = (state[f"radio_model.input_conditioner.norm_{kind}"] for kind in ("mean", "std"))
            with torch.no_grad():
                tokens = model.forward_features((image - mean) / std)
            tokens = tokens["patches"][0] if isinstance(tokens, dict) else tokens[0]
            assert tokens.shape == (number + rows * columns, WIDTH)
            inputs[f"image_{i}"] = image
            expected[f"tokens_{i}"] = tokens[number:].contiguous()
            expected[f"prefix_{i}"] = tokens[:number].contiguous()
            expected[f"pooled_{i}"] = tokens[summary].flatten()
        (folder / name).mkdir(exist_ok=True)
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
        save_file(inputs, folder / name / "inputs.safetensors")
        save_file(expected, folder / name / "expected.safetensors")
        text = json.dumps(config(version, num_cls_tokens, summary), indent=2)
        (folder / name / "config.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
