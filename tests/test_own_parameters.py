"""An encoder has the packed model's own parameters, by name and shape: what trainers, PEFT and others do by them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import accelerate
import aimv2_checkpoints
import dinov3_checkpoints
import huggingface_hub
import onevision_checkpoints
import pytest
import torch
from originals import original_class, read_by_original, run_original
from safetensors.torch import load_file, save_model
from tiny_encoders import FAMILIES, GRIDS, patches_of, relative, tiny
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

import nopad
from nopad.checkpoints.formats import Checkpoint, StoredTensor
from nopad.checkpoints.fused_names import from_fused_names

WITH_A_HEAD = [family for family in FAMILIES if family in ("aimv2 with a head", "siglip2", "siglip", "onevision")]
GOLDENS = {
    "aimv2-apple-native": "aimv2",
    "aimv2-apple-learned": "aimv2",
    "aimv2-apple-lit": "aimv2",
    "open-clip": "clip",
    "dinov2-meta": "dinov2",
    "dinov2-meta-registers-swiglu": "dinov2 gated",
    "dinov3-meta": "dinov3",
    "dinov3-meta-swiglu": "dinov3",
    "onevision-encoder": "onevision",
    "preview-v0-packing": "onevision",
}
OTHERS = {
    "aimv2": "siglip2",
    "siglip2": "dinov3",
    "siglip": "onevision",
    "clip": "siglip2",
    "metaclip2": "dinov2",
    "dinov2": "dinov3",
    "dinov3": "aimv2",
    "onevision": "siglip2",
}
OF_0_1 = [family for family in FAMILIES if not family.startswith(("dinov2", "clip", "metaclip2"))]

every_family = pytest.mark.parametrize("family", FAMILIES)
every_head = pytest.mark.parametrize("family", WITH_A_HEAD)


@pytest.fixture
def folder(tmp_path, family):
    return tiny(family, tmp_path / "checkpoint")


@pytest.fixture
def encoder(folder):
    return nopad.load(folder)


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is a development dependency")


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def copied(state):
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def blank(encoder):
    """The same architecture with other weights."""
    other = type(encoder)(copy.deepcopy(encoder.config)).eval()
    assert not same(other.state_dict(), encoder.state_dict())
    return other


@torch.no_grad()
def features(encoder):
    """Tokens and pooled vectors of one pack."""
    output = encoder.encode(patches_of(encoder), GRIDS)
    return torch.cat((output.tokens, output.pooled))


def spoken_by(encoder):
    """The dialects that there are of an architecture; timm's of DINOv2 have no mask token."""
    gated = getattr(encoder.config, "use_gated_mlp", False)
    others = {"Meta" if gated else "Meta, gated"}
    if encoder.family == "dinov2":
        others |= {"timm", "timm, registers"}
    return [dialect for dialect in encoder.dialects if dialect.name not in others]


@every_family
def test_names_and_shapes_are_those_of_the_original(family, folder, encoder):
    original = read_by_original(family, folder)
    assert shapes(encoder.state_dict()) == shapes(original.state_dict())
    other = blank(encoder)
    other.load_state_dict(original.state_dict())
    assert same(other.state_dict(), original.state_dict())
    assert torch.equal(features(other), features(encoder))
    randomised = original_class(family)(original.config)
    assert not same(randomised.state_dict(), encoder.state_dict())
    randomised.load_state_dict(encoder.state_dict())
    assert same(randomised.state_dict(), original.state_dict())


@pytest.mark.parametrize(("golden", "family"), GOLDENS.items())
def test_other_dialects_have_the_names_of_the_original_in_memory(goldens, golden, family):
    encoder = nopad.load(goldens / golden)
    config_class = original_class(family).config_class
    names = config_class().to_dict()
    fields = {name: value for name, value in encoder.config.to_dict().items() if name in names}
    with torch.device("meta"):
        original = original_class(family)(config_class(**fields))
    extra = set() if encoder.projection is None else {"visual_projection.weight"}
    ours = shapes(encoder.state_dict())
    assert extra <= ours.keys()
    assert {name: shape for name, shape in ours.items() if name not in extra} == shapes(original.state_dict())


class Fit(Trainer):
    """Trains away from what evaluation wants, so that the first checkpoint is the best."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        loss = model(**inputs).square().mean()
        loss = -loss if model.training else loss
        return (loss, {"loss": loss}) if return_outputs else loss


def trainer(model, folder, **more):
    arguments = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["grid_thw"],
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "save_steps": 1,
        "logging_strategy": "no",
        **more,
    }
    data = [{"hidden_states": patches_of(model), "grid_thw": GRIDS}] * 2 if hasattr(model, "patch_dim") else None
    arguments = TrainingArguments(output_dir=folder, **arguments)
    return Fit(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data and data[:1],
        data_collator=lambda rows: rows[0],
    )


@every_family
def test_a_trainer_resumes_from_the_weights_that_it_saved(family, folder, encoder, tmp_path):
    trainer(encoder, tmp_path / "run").train()
    first, second = (nopad.load(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2))
    assert same(second.state_dict(), encoder.state_dict())
    assert not same(first.state_dict(), second.state_dict())
    loaded = blank(encoder)
    trainer(loaded, tmp_path / "other")._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-1"))
    assert same(loaded.state_dict(), first.state_dict())
    resumed = nopad.load(folder)
    trainer(resumed, tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert same(resumed.state_dict(), second.state_dict())


@every_family
def test_a_trainer_ends_with_the_best_weights(family, encoder, tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    trained = trainer(encoder, tmp_path, **best)
    trained.train()
    assert trained.state.best_model_checkpoint.endswith("checkpoint-1")
    first, second = (nopad.load(tmp_path / f"checkpoint-{step}").state_dict() for step in (1, 2))
    assert not same(first, second)
    assert same(encoder.state_dict(), first)


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("dino")])
def test_the_trainer_does_the_same_to_the_original(family, folder, tmp_path):
    """Of transformers' DINOv2 and DINOv3 it leaves the layers as they were."""
    original = read_by_original(family, folder)
    trainer(original, tmp_path / "run").save_model(str(tmp_path / "saved"))
    other = original_class(family)(original.config)
    trainer(other, tmp_path / "run")._load_from_checkpoint(str(tmp_path / "saved"))
    assert same(other.state_dict(), original.state_dict())


SHARD = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import nopad
from tiny_encoders import GRIDS, patches_of

torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for folder in sys.argv[1:]:
    encoder = nopad.load(folder)
    for layer in encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
    assert type(encoder).__name__.startswith("FSDP"), type(encoder)
    encoder.train()(patches_of(encoder), GRIDS).square().mean().backward()
    assert all(p.grad is not None for layer in encoder.layers for p in layer.parameters())
    state = get_model_state_dict(encoder, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    encoder.save_pretrained(f"{folder}-saved", state_dict=state)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Of each family a checkpoint, and beside it the folder that it was saved to under FSDP."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    root = tmp_path_factory.mktemp("sharded")
    folders = {family: tiny(family, root / family) for family in FAMILIES}
    path = json.dumps(sys.path)
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {path}\n{SHARD}", *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


@every_family
def test_a_sharded_encoder_saves_what_all_load(family, sharded):
    folder = sharded[family]
    saved = folder.with_name(f"{folder.name}-saved")
    expected = nopad.load(folder).state_dict()
    assert same(nopad.load(saved).state_dict(), expected)
    assert same(read_by_original(family, saved).state_dict(), expected)
    assert same(load_file(saved / "model.safetensors"), load_file(folder / "model.safetensors"))


class WholeConfig(PreTrainedConfig):
    model_type = "whole"
    tower: dict | None = None


def whole_of(kind):
    """A model with an encoder of this class inside, as a vision-language model has one."""

    class Whole(PreTrainedModel):
        config_class = WholeConfig
        _supports_sdpa = True

        def __init__(self, config):
            super().__init__(config)
            self.vision_tower = kind[0](kind[1](**config.tower))
            self.projector = nn.Linear(4, 4)
            self.post_init()

    return Whole


@every_family
def test_a_model_with_an_encoder_inside_is_saved_and_loaded(family, encoder, tmp_path):
    kind = whole_of((type(encoder), type(encoder.config)))
    whole = kind(WholeConfig(tower=encoder.config.to_dict())).eval()
    whole.vision_tower.load_state_dict(encoder.state_dict())
    for tower in (whole.vision_tower, encoder):
        whole.vision_tower = tower
        whole.save_pretrained(tmp_path / "saved")
        loaded, told = kind.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(told.values()), told
        assert same(loaded.state_dict(), whole.state_dict())
        assert relative(features(loaded.vision_tower), features(encoder)) < 1e-6


@every_family
def test_a_subclass_made_from_a_config_saves_what_all_load(family, folder, encoder, tmp_path):
    mine = type("Mine", (type(encoder),), {})
    mine(encoder.config).save_pretrained(tmp_path / "random")
    made = mine(encoder.config)
    made.load_state_dict(encoder.state_dict())
    made.save_pretrained(tmp_path / "saved")
    assert same(load_file(tmp_path / "saved" / "model.safetensors"), load_file(folder / "model.safetensors"))
    assert type(mine.from_pretrained(tmp_path / "saved")) is mine
    for load in (nopad.load, mine.from_pretrained, partial(read_by_original, family)):
        assert same(load(tmp_path / "saved").state_dict(), encoder.state_dict())
        assert not same(load(tmp_path / "random").state_dict(), encoder.state_dict())


@pytest.mark.parametrize(
    ("family", "other"),
    [("aimv2", "aimv2-apple-native"), ("dinov3 gated", "dinov3-meta"), ("onevision", "preview-v0-packing")],
)
def test_saving_while_others_load_another_dialect(family, folder, encoder, other, goldens, tmp_path):
    expected = load_file(folder / "model.safetensors").keys()
    loaded, over = [], threading.Event()

    def load():
        while not over.is_set():
            loaded.append(nopad.load(goldens / other).dialect)

    with ThreadPoolExecutor(2) as pool:
        loading = [pool.submit(load) for _ in range(2)]
        try:
            number = 0
            while number < 6 or (len(loaded) < 4 and not any(each.done() for each in loading)):
                number += 1
                encoder.save_pretrained(tmp_path / str(number))
                assert load_file(tmp_path / str(number) / "model.safetensors").keys() == expected
        finally:
            over.set()
    assert [each.result() for each in loading] == [None, None]
    assert len(loaded) >= 4
    assert set(loaded) == {nopad.load(goldens / other).dialect} != {encoder.dialect}


def shaken(model):
    """Adapters far from their init, which does nothing."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape) * (0.1 if "magnitude" in name else 0.3))
    return model


@every_family
def test_dora_changes_nothing_untrained_and_merges(family, folder, encoder, peft):
    expected = features(encoder)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], use_dora=True)
    adapted = peft.get_peft_model(encoder, config).eval()
    assert sum("lora_magnitude_vector" in name for name, _ in adapted.named_parameters()) >= 9
    assert relative(features(encoder), expected) < 1e-5
    assert relative(features(adapted.merge_and_unload()), expected) < 1e-5
    trained = shaken(peft.get_peft_model(nopad.load(folder), config).eval())
    changed = features(trained.base_model.model)
    assert relative(changed, expected) > 0.01
    assert relative(features(trained.merge_and_unload()), changed) < 1e-5


@every_family
@torch.no_grad()
def test_an_adapter_of_the_original_is_one_of_the_encoder(family, folder, encoder, peft, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    image = torch.randn(3, 5 * encoder.patch_size, 4 * encoder.patch_size)
    if encoder.config.model_type == "aimv2_vision_model" and not encoder.config.is_native:
        image = torch.randn(3, *[5 * encoder.patch_size] * 2)  # the one size that this original takes
    original = read_by_original(family, folder)
    plain = run_original(family, original, image).tokens
    adapted = shaken(peft.get_peft_model(original, config).eval())
    adapted.save_pretrained(tmp_path / "adapter")
    expected = run_original(family, original, image).tokens
    assert relative(expected, plain) > 0.01
    loaded = peft.PeftModel.from_pretrained(encoder, tmp_path / "adapter").eval()
    pack = nopad.Pack.of([image], encoder.patch_size, encoder.patch_order)
    assert relative(loaded(pack), expected) < 1e-5
    assert relative(loaded.merge_and_unload()(pack), expected) < 1e-5


@every_head
@pytest.mark.parametrize("init", [True, "pissa"])
def test_adapters_on_all_linear_maps_reach_the_head(family, encoder, peft, init):
    expected = features(encoder)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init)
    model = peft.get_peft_model(encoder, config)
    assert relative(features(encoder.eval()), expected) < 1e-5
    adapters = {name: p for name, p in shaken(model).named_parameters() if "lora_" in name}
    assert any(".head." in name for name in adapters)
    encoder.encode(patches_of(encoder), GRIDS).pooled.square().sum().backward()
    assert not [name for name, p in adapters.items() if p.grad is None or not p.grad.any()]
    changed = features(encoder)
    assert relative(changed, expected) > 0.01
    assert relative(features(model.merge_and_unload()), changed) < 1e-5


@every_head
def test_a_head_on_disk_gives_the_same_features(family, folder, encoder, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is a development dependency")
    device_map = {"embeddings": "cpu", "layers": "cpu", "norm": "cpu", "head": "disk"}
    if family == "onevision":
        device_map["layernorm_pre"] = "cpu"
    offloaded = type(encoder).from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert {p.device.type for p in offloaded.head.parameters()} == {"meta"}
    assert {p.device.type for p in offloaded.layers.parameters()} == {"cpu"}
    assert relative(features(offloaded), features(encoder)) < 1e-6


@every_family
def test_torchs_dynamic_quantisation_takes_an_encoder(family, encoder):
    expected = features(encoder)
    quantised = torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear})
    assert type(quantised.layers[0].attention.q) is not nn.Linear
    cosine = torch.cosine_similarity(features(quantised), expected, dim=1)
    assert cosine.min() > 0.98
    assert not torch.equal(features(quantised), expected)


@pytest.fixture(params=["alone", "nested"])
def loads(request, encoder):
    """`load_state_dict` of an encoder, or of a module that it is in, given the state dict of the encoder."""
    if request.param == "alone":
        return encoder.load_state_dict
    outer = nn.ModuleDict({"tower": encoder, "other": nn.Linear(2, 2)})
    others = {name: tensor for name, tensor in outer.state_dict().items() if name.startswith("other")}

    def load(state, **arguments):
        return outer.load_state_dict({**{f"tower.{n}": t for n, t in state.items()}, **others}, **arguments)

    return load


@every_family
def test_names_in_a_file_are_loaded_as_those_in_memory(family, folder, encoder, loads):
    expected = copied(encoder.state_dict())
    for state in (load_file(folder / "model.safetensors"), expected):
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.zero_()
        told = loads(state)
        assert told == ([], [])
        assert same(encoder.state_dict(), expected)


@every_family
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_family_are_refused(family, encoder, loads, strict, tmp_path):
    other = nopad.load(tiny(OTHERS[family.split()[0]], tmp_path / "other"))
    before = copied(encoder.state_dict())
    with pytest.raises(ValueError, match=rf"expected {encoder.family} weights, got those of {other.family}$"):
        loads(other.state_dict(), strict=strict)
    assert same(encoder.state_dict(), before)
    loads({name: tensor + 1 for name, tensor in before.items()}, strict=strict)
    assert not same(encoder.state_dict(), before)


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("siglip")])
def test_weights_in_another_dialect_are_refused(family, encoder, loads):
    others = [dialect for dialect in spoken_by(encoder) if not dialect.is_original]
    assert others
    for dialect in others:
        state = dialect.table.to_file(encoder.state_dict())
        for strict in (True, False):
            with pytest.raises(ValueError, match=rf"got those of {dialect.name}; .* nopad\.load"):
                loads(state, strict=strict)


def fused(encoder):
    """The state dict that nopad 0.1 kept."""
    state, config = {}, encoder.config

    def keep(path, *linears):
        for leaf in ("weight", "bias"):
            parts = [getattr(linear, leaf) for linear in linears if getattr(linear, leaf, None) is not None]
            if parts:
                state[f"{path}.{leaf}"] = torch.cat([part.detach() for part in parts])

    def keep_mlp(path, mlp):
        if hasattr(mlp, "gate"):
            keep(f"{path}.gate_up", mlp.gate, mlp.up)
        else:
            keep(f"{path}.up", mlp.up)
        keep(f"{path}.down", mlp.down)

    embeddings, head = encoder.embeddings, encoder.head if encoder.family != "dinov3" else None
    keep("embeddings.proj", embeddings.proj)
    kernel = embeddings.proj.weight.detach()
    if kernel.ndim == 2:  # NaFlex's, whose columns are in this order
        kernel = kernel.unflatten(1, (config.patch_size, config.patch_size, 3)).permute(0, 3, 1, 2)
    kernel = kernel.permute(0, 2, 3, 1) if config.patch_order == "hwc" else kernel
    state["embeddings.proj.weight"] = kernel.flatten(1)
    for name in ("cls_token", "register_tokens", "mask_token"):
        if hasattr(embeddings, name):
            state[f"embeddings.{name}"] = getattr(embeddings, name).detach()
    if getattr(embeddings, "position_embedding", None) is not None:
        state["embeddings.position_embedding"] = embeddings.position_embedding.weight.detach()
    keep(
        "embeddings.norm", encoder.layernorm_pre if encoder.family == "onevision" else getattr(embeddings, "norm", None)
    )
    for number, block in enumerate(encoder.layers):
        path, attention = f"layers.{number}", block.attention
        keep(f"{path}.norm1", block.norm1)
        keep(f"{path}.attention.qkv", attention.q, attention.k, attention.v)
        keep(f"{path}.attention.proj", attention.proj)
        keep(f"{path}.norm2", block.norm2)
        keep_mlp(f"{path}.mlp", block.mlp)
        for name in ("layer_scale1", "layer_scale2"):
            if getattr(block, name) is not None:
                state[f"{path}.{name}"] = getattr(block, name).lambda1.detach()
    keep("norm", encoder.norm)
    if encoder.family == "aimv2" and head is not None:
        state["head.cls_token"] = head.cls_token.detach()
        keep("head.kv", head.k, head.v)
        keep("head.proj", head.proj)
    elif head is not None:
        state["head.probe"] = head.probe.detach()
        state["head.qkv.weight"] = head.attention.in_proj_weight.detach()
        state["head.qkv.bias"] = head.attention.in_proj_bias.detach()
        keep("head.proj", head.attention.out_proj)
        keep("head.norm", head.norm)
        keep_mlp("head.mlp", head.mlp)
    return state


@pytest.mark.parametrize("family", OF_0_1)
@pytest.mark.parametrize("patch_order", ["hwc", "chw"])
def test_fused_matrices_of_nopad_0_1_are_converted(family, folder, patch_order):
    encoder = nopad.load(folder, patch_order=patch_order)
    other = blank(encoder)
    other.load_state_dict(from_fused_names(other, fused(encoder)))
    assert same(other.state_dict(), encoder.state_dict())
    assert same(fused(other), fused(encoder))
    assert torch.equal(features(other), features(encoder))


@pytest.mark.parametrize("variant", dinov3_checkpoints.VARIANTS)
def test_fused_biases_of_nopad_0_1_are_those_that_exist(tmp_path, variant):
    original = dinov3_checkpoints.tiny_original(**dinov3_checkpoints.VARIANTS[variant])
    encoder = nopad.load(dinov3_checkpoints.save(tmp_path, original))
    assert same(from_fused_names(encoder, fused(encoder)), original.state_dict())
    config = encoder.config
    number = config.query_bias + config.key_bias + config.value_bias
    bias = fused(encoder).get("layers.0.attention.qkv.bias", torch.empty(0))
    assert len(bias) == number * config.hidden_size


@pytest.mark.parametrize("family", OF_0_1)
def test_fused_matrices_of_nopad_0_1_are_refused_by_name(family, encoder, loads):
    before = copied(encoder.state_dict())
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"nopad 0\.1, .*nopad\.checkpoints\.fused_names\.from_fused_names"):
            loads(fused(encoder), strict=strict)
    assert same(encoder.state_dict(), before)


@pytest.mark.parametrize("family", OF_0_1)
def test_what_is_no_state_dict_of_nopad_0_1_is_not_converted(family, encoder, tmp_path):
    state = fused(encoder)
    wide = "layers.0.attention.qkv.weight"
    other = nopad.load(tiny(OTHERS[family.split()[0]], tmp_path / "other"))
    wrong = [
        {name: tensor for name, tensor in state.items() if name != "norm.weight"},
        {name: tensor for name, tensor in state.items() if name != wide},
        {**state, "layers.0.more.weight": torch.zeros(2)},
        {**state, wide: state[wide][:-3]},
        {**state, wide: state[wide][:-1]},
        {**state, "embeddings.proj.weight": state["embeddings.proj.weight"][:, :-1]},
        {**state, "layers.3.attention.qkv.weight": state[wide]},
        {**state, wide: state[wide][0]},
        fused(other),
        {},
    ]
    for case in wrong:
        with pytest.raises(ValueError, match=r"^state_dict: "):
            from_fused_names(encoder, case)
    assert same(from_fused_names(encoder, state), encoder.state_dict())


def stored(state):
    tensors = {name: StoredTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}
    return Checkpoint("stored", tensors)


@every_family
def test_every_dialects_table_leads_there_and_back(family, encoder):
    state = encoder.state_dict()
    for dialect in spoken_by(encoder):
        file = dialect.table.to_file(state)
        assert dialect.matches(file)
        tensors = dialect.convert(dialect.select(stored(file))).tensors
        assert {name: tensors[name].shape for name in state} == shapes(state)
        assert same({name: tensors[name].read() for name in state}, state)
        masked = {name: tensors[name].read() for name in tensors.keys() - state.keys()}
        assert all(name.endswith("attention.k_proj.bias") and not bias.any() for name, bias in masked.items())
        assert bool(masked) == (
            dialect.name.startswith("Meta") and family.startswith("dinov3") and not encoder.config.key_bias
        )


@pytest.mark.parametrize(
    ("family", "dialect", "write"),
    [
        ("aimv2", "early transformers", aimv2_checkpoints.early),
        ("aimv2", "Apple", aimv2_checkpoints.apple),
        ("aimv2", "timm", aimv2_checkpoints.timm),
        ("onevision", "preview v0", onevision_checkpoints.preview),
    ],
)
def test_tables_write_what_each_project_writes(encoder, dialect, write):
    (spoken,) = (each for each in encoder.dialects if each.name == dialect)
    state = encoder.state_dict()
    assert same(spoken.table.to_file(state), write(state))


@pytest.mark.parametrize("variant", [each for each in dinov3_checkpoints.VARIANTS if each != "value bias alone"])
def test_tables_write_what_meta_writes(tmp_path, variant):
    original = dinov3_checkpoints.tiny_original(**dinov3_checkpoints.VARIANTS[variant])
    encoder = nopad.load(dinov3_checkpoints.save(tmp_path, original))
    (dialect,) = (each for each in spoken_by(encoder) if each.name.startswith("Meta"))
    written = dialect.select(stored(dinov3_checkpoints.meta(original))).tensors  # what is masked is zero
    assert same(dialect.table.to_file(encoder.state_dict()), {name: t.read() for name, t in written.items()})


@every_family
def test_a_compiled_encoder_saves_the_same(family, folder, encoder, tmp_path):
    expected = copied(encoder.state_dict())
    encoder.compile(128, max_segments=8, compiled=False)
    with torch.no_grad():
        encoder(patches_of(encoder), GRIDS)
    assert encoder.compiled_capacity == 128
    assert same(encoder.state_dict(), expected)
    encoder.save_pretrained(tmp_path / "saved")
    assert same(load_file(tmp_path / "saved" / "model.safetensors"), load_file(folder / "model.safetensors"))
    other = blank(encoder)
    other.compile(128, max_segments=8, compiled=False)
    other.load_state_dict(expected)
    assert relative(features(other), features(encoder)) < 1e-6


@every_family
def test_parts_are_reached_and_set_by_role(family, encoder):
    before, names = features(encoder), encoder.state_dict().keys()
    path = {"dinov2": "encoder.layer", "dinov3": "model.layer"}.get(encoder.family, "encoder.layers")
    assert encoder.layers is encoder.get_submodule(path)
    norm = {
        "aimv2": "rms_norm",
        "siglip2": "post_layernorm",
        "clip": "post_layernorm",
        "dinov2": "layernorm",
        "dinov3": "norm",
        "onevision": "layernorm_post",
    }
    assert encoder.norm is encoder.get_submodule(norm[encoder.family])
    attention = "self_attn" if encoder.family in ("siglip2", "clip", "onevision") else "attention"
    mlp = "ffn" if encoder.family == "aimv2" else "mlp"
    for number, layer in enumerate(encoder.layers):
        assert layer.attention is encoder.get_submodule(f"{path}.{number}.{attention}")
        assert layer.mlp is encoder.get_submodule(f"{path}.{number}.{mlp}")
    assert (getattr(encoder, "head", None) is not None) == (family in WITH_A_HEAD)

    encoder.layers = encoder.layers[:1]
    assert encoder.get_submodule(path) is encoder.layers
    assert encoder.state_dict().keys() == {n for n in names if not n.startswith((f"{path}.1.", f"{path}.2."))}
    states = encoder.encode(patches_of(encoder), GRIDS, output_hidden_states=True).hidden_states
    assert len(states) == 2
    fewer = features(encoder)
    assert relative(fewer, before) > 1e-3

    encoder.layers[0].mlp = nn.Identity()
    assert type(encoder.get_submodule(f"{path}.0.{mlp}")) is nn.Identity
    assert not [name for name in encoder.state_dict() if name.startswith(f"{path}.0.{mlp}.")]
    without = features(encoder)
    assert relative(without, fewer) > 1e-3

    encoder.norm = nn.Identity()
    assert type(encoder.get_submodule(norm[encoder.family])) is nn.Identity
    assert relative(features(encoder), without) > 1e-3
    if family in WITH_A_HEAD:
        encoder.head = None
        assert not [name for name in encoder.state_dict() if name.startswith("head.")]
        output = encoder.encode(patches_of(encoder), GRIDS)
        first = int(GRIDS[0].prod())
        torch.testing.assert_close(output.pooled[0], output.tokens[:first].mean(dim=0))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_loses_is_an_error(tmp_path, monkeypatch, family):
    folder, load = tiny(family, tmp_path / "checkpoint"), PreTrainedModel.from_pretrained.__func__

    def losing(cls, *args, state_dict, **kwargs):
        state_dict.popitem()
        return load(cls, *args, state_dict=state_dict, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(losing))
    with pytest.raises(ValueError, match="transformers has not loaded 1: "):
        nopad.load(folder)


def accelerated(encoder, folder):
    accelerate.Accelerator().save_model(encoder, folder)


SAVERS = {
    "safetensors": lambda encoder, folder: save_model(encoder, str(folder / "model.safetensors")),
    "huggingface_hub": lambda encoder, folder: huggingface_hub.save_torch_model(encoder, folder, max_shard_size="20KB"),
    "accelerate": accelerated,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("saver", SAVERS)
def test_savers_that_leave_out_tied_parameters_save_them_all(tmp_path, family, saver):
    encoder = nopad.load(tiny(family, tmp_path / "checkpoint"))
    (tmp_path / "saved").mkdir()
    SAVERS[saver](encoder, tmp_path / "saved")
    stored = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        stored |= load_file(file)
    state = encoder.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items())
