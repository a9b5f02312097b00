"""Writes the golden cases `open-clip*`: tiny models of OpenCLIP with random weights, and what they return.

pip install open_clip_torch==3.3.0 timm==1.0.31 torch==2.13.0 torchvision==0.28.0 safetensors
python tests/goldens/make_open_clip.py tests/goldens
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import timm
import torch
from make_timm import randomize
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file

VISION = {"image_size": 20, "layers": 2, "width": 32, "head_width": 8, "patch_size": 4}
CASES = {
    "open-clip": {"mlp_ratio": 1.5},
    "open-clip-quickgelu": {"mlp_ratio": 4.9231, "quick_gelu": True},  # the ratio of bigG, which is rounded down
}
TEXT = {"context_length": 8, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
IDS = [[28, 0, 1, 16, 3, 18, 29, 0], [28, 27, 29, 0, 0, 0, 0, 0], [28, 0, 1, 2, 3, 4, 5, 29]]
"""Of `abc de`, `n` and `abcdefghijklmn`, cut, by a tokenizer of the letters a to n."""


def perception_encoder() -> tuple[CustomTextCLIP, dict]:
    """PE core as OpenCLIP builds it: timm's image tower, whose sizes its configs do not have, in small."""
    text = {**TEXT, "context_length": 8, "heads": 2}
    vision = {"timm_model_name": "vit_pe_core_base_patch16_224", "timm_model_pretrained": False}
    model_cfg = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 20, **vision, "timm_pool": "map", "timm_proj": None},
        "text_cfg": text,
        "custom_text": True,
    }
    create, sizes = timm.create_model, {"img_size": 20, "embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 4}
    sizes |= {"mlp_ratio": 1.5, "dynamic_img_size": False}
    with mock.patch("timm.create_model", lambda name, **arguments: create(name, **arguments, **sizes)):
        model = CustomTextCLIP(**{key: value for key, value in model_cfg.items() if key != "custom_text"})
    return model.eval(), model_cfg


def main(folder: Path) -> None:
    """Write all cases."""
    write_perception_encoder(folder / "open-clip-pe")
    for name, changes in CASES.items():
        ratio = changes["mlp_ratio"]
        model_cfg = {"embed_dim": 24, "vision_cfg": {**VISION, "mlp_ratio": ratio}, "text_cfg": TEXT}
        if "quick_gelu" in changes:
            model_cfg["quick_gelu"] = True
        model = CLIP(**model_cfg).eval()
        model.visual.output_tokens = True
        randomize(model)
        model.visual.image_mean, model.visual.image_std = (0.48, 0.45, 0.4), (0.26, 0.26, 0.27)
        model.visual.preprocess_cfg = {"interpolation": "bicubic", "resize_mode": "shortest"}
        case = folder / name
        case.mkdir(exist_ok=True)
        save_config_for_hf(model, case / "open_clip_config.json", model_cfg)
        torch.save(model.state_dict(), case / "open_clip_pytorch_model.bin")
        generator = torch.Generator().manual_seed(1)
        images = [torch.randn(1, 3, 20, 20, generator=generator) for _ in range(2)]
        inputs, expected = {"input_ids": torch.tensor(IDS)}, {}
        with torch.no_grad():
            expected["text_embeds"] = model.encode_text(inputs["input_ids"])
            for number, image in enumerate(images):
                inputs[f"image_{number}"] = image
                embed, tokens = model.visual(image)
                expected[f"tokens_{number}"] = tokens[0].contiguous()
                expected[f"image_embed_{number}"] = embed[0].contiguous()
            model.visual.output_tokens = False
            expected["logits_per_image"] = model.get_logits(torch.cat(images), inputs["input_ids"])[0]
        save_file(inputs, case / "inputs.safetensors")
        save_file(expected, case / "expected.safetensors")


def write_perception_encoder(case: Path) -> None:
    """Write the case of PE core."""
    model, model_cfg = perception_encoder()
    randomize(model)
    torch.nn.init.zeros_(model.visual.trunk.head.bias)
    model.visual.image_mean = model.visual.image_std = (0.5, 0.5, 0.5)
    model.visual.preprocess_cfg = {"interpolation": "bilinear", "resize_mode": "squash"}
    case.mkdir(exist_ok=True)
    save_config_for_hf(model, case / "open_clip_config.json", model_cfg)
    save_file(model.state_dict(), case / "open_clip_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(1, 3, 20, 20, generator=generator) for _ in range(2)]
    inputs, expected = {"input_ids": torch.tensor(IDS)}, {}
    with torch.no_grad():
        expected["text_embeds"] = model.encode_text(inputs["input_ids"])
        for number, image in enumerate(images):
            inputs[f"image_{number}"] = image
            expected[f"tokens_{number}"] = model.visual.trunk.forward_features(image)[0, 1:].contiguous()
            expected[f"image_embed_{number}"] = model.encode_image(image)[0].contiguous()
        expected["logits_per_image"] = model.get_logits(torch.cat(images), inputs["input_ids"])[0]
    save_file(inputs, case / "inputs.safetensors")
    save_file(expected, case / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
