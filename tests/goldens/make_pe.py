"""Writes the golden cases `pe-*`: tiny checkpoints under Meta's names, and what Meta's own model makes of them.

The model is that of facebookresearch/perception_models (`core/vision_encoder`), in the copy that the package
`inference` has; nothing else of that package is imported.

pip install --no-deps inference==1.8.3 einops==0.8.2
pip install timm==1.0.31 torch==2.14.1 torchvision==0.29.1 safetensors
python tests/goldens/make_pe.py tests/goldens
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

SMALL = {"patch_size": 4, "width": 32, "layers": 2, "heads": 4, "mlp_ratio": 1.5, "image_size": 22}
LANG = {"pool_type": "none", "use_ln_post": False, "output_dim": None}
CASES = {
    "pe-core": {"use_cls_token": True, "output_dim": 24},
    "pe-core-without-cls": {"output_dim": 24},
    "pe-lang": {**LANG, "use_cls_token": True, "ls_init_value": 0.1},
    "pe-spatial": {**LANG, "ls_init_value": 0.1},
    "pe-spatial-plain": {**LANG, "use_cls_token": True},
}
"""Arguments of Meta's model beside the sizes; the table has 5 × 5 positions, and two pixels are covered by no patch."""
GRIDS = [(5, 5), (3, 7), (1, 8), (6, 6), (9, 2)]


def models() -> types.ModuleType:
    """The module of Meta's models, without the rest of the package that it lies in."""
    spec = importlib.util.find_spec("inference")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent
    for name in ("inference", "inference.models", "inference.models.perception_encoder"):
        module = types.ModuleType(name)
        module.__path__ = [str(path.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    encoder = "inference.models.perception_encoder.vision_encoder"
    config = types.ModuleType(f"{encoder}.config")  # of published models, which it also downloads
    for name in ("PE_TEXT_CONFIG", "PE_VISION_CONFIG", "PEConfig", "PETextConfig", "fetch_pe_checkpoint"):
        setattr(config, name, None)
    sys.modules[config.__name__] = config
    return importlib.import_module(f"{encoder}.pe")


def randomize(model: torch.nn.Module) -> None:
    """Weights far from their init, but for the fixed frequencies of the rotary embedding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(noise * scale + (1.0 if parameter.ndim == 1 else 0.0))


def write_texts(module: types.ModuleType, case: Path) -> dict[str, torch.Tensor]:
    """Write what the text tower makes of texts, and return its tensors and those of the similarity."""
    sizes = {"context_length": 8, "vocab_size": 30, "width": 64, "heads": 1, "layers": 1, "output_dim": 24}
    model = module.TextTransformer(**sizes).eval()
    randomize(model)
    ids = torch.tensor([[28, 0, 1, 16, 3, 18, 29, 0], [28, 27, 29, 0, 0, 0, 0, 0], [28, 0, 1, 2, 3, 4, 5, 29]])
    case.mkdir(exist_ok=True)
    with torch.no_grad():
        save_file({"input_ids": ids, "text_embeds": model(ids)}, case / "texts.safetensors")
    return {**model.state_dict(), "logit_scale": torch.tensor(1.5)}


def main(folder: Path) -> None:
    """Write all cases; the whole model's tensors for `pe-core`, those of its text tower among them."""
    module = models()
    for name, arguments in CASES.items():
        model = module.VisionTransformer(**SMALL, **arguments).eval()
        randomize(model)
        state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
        if name == "pe-core":
            state = {f"visual.{key}": value for key, value in state.items()} | write_texts(module, folder / name)
        generator = torch.Generator().manual_seed(1)
        inputs, expected, number = {}, {}, int(model.use_cls_token)
        for i, (rows, columns) in enumerate(GRIDS):
            image = torch.randn(1, 3, 4 * rows, 4 * columns, generator=generator)
            with torch.no_grad():
                tokens = model.forward_features(image, norm=True)
                expected[f"tokens_{i}"] = tokens[0, number:].contiguous()
                if number:
                    expected[f"prefix_{i}"] = tokens[0, :number].contiguous()
                if model.attn_pool is not None:
                    expected[f"pooled_{i}"] = model._pool(tokens)[0].contiguous()
                    expected[f"image_embed_{i}"] = model(image)[0].contiguous()
            inputs[f"image_{i}"] = image
        (folder / name).mkdir(exist_ok=True)
        torch.save(state, folder / name / f"{name}.pt")
        save_file(inputs, folder / name / "inputs.safetensors")
        save_file(expected, folder / name / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
