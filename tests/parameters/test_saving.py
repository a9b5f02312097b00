"""Encoders that are saved: inside another model, sharded, compiled, by savers of tensors."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import accelerate
import huggingface_hub
import pytest
import torch
from originals import read_by_original
from own_parameters import blank, copied, every_family, features, same
from safetensors.torch import load_file, save_model
from tiny_encoders import FAMILIES, GRIDS, patches_of, relative, tiny
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

import nopad

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
        loaded, info = kind.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(info.values()), info
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
