"""What loading says of checkpoints that are no checkpoint, not whole, or not one."""

from __future__ import annotations

import json

import pytest
import torch
from aimv2_checkpoints import apple, tiny_original, write
from originals import assert_parity
from safetensors.torch import save_file

import nopad


def test_pickled_file_is_read_without_running_it(tmp_path):
    original = tiny_original(hidden_size=128, num_attention_heads=1)
    torch.save(apple(original.state_dict()), tmp_path / "weights.pth")
    assert_parity("aimv2", nopad.load(tmp_path / "weights.pth"), original)

    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('the pickle was run')",))

    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth.*tensors and nothing else"):
        nopad.load(tmp_path / "evil.pth")


def test_a_whole_missing_layer_is_noticed(tmp_path):
    original = tiny_original()
    state = {name: tensor for name, tensor in original.state_dict().items() if ".layers.2." not in name}
    with pytest.raises(ValueError, match=r"9 missing: encoder\.layers\.2\."):
        nopad.load(write(tmp_path, state, original.config.to_dict()))


def test_long_lists_are_cut_after_ten_and_counted(tmp_path):
    original = tiny_original()
    extra = {f"surprise.{i:02}": torch.zeros(1) for i in range(12)}
    with pytest.raises(ValueError, match=r"12 unexpected: surprise\.00.*surprise\.09, …") as error:
        nopad.load(write(tmp_path, {**original.state_dict(), **extra}, original.config.to_dict()))
    assert "surprise.10" not in str(error.value)


def test_unknown_family_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"unknown family.*layer\.weight.*aimv2"):
        nopad.load(write(tmp_path, {"layer.weight": torch.zeros(2, 2)}, None))


def test_no_weights_and_no_such_place(tmp_path):
    with pytest.raises(ValueError, match="no weights there"):
        nopad.load(tmp_path)
    with pytest.raises(OSError, match="no-such-model"):
        nopad.load("nobody/no-such-model")


def test_index_that_names_an_absent_shard(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"gone\.safetensors"):
        nopad.load(tmp_path)


def test_checkpoints_own_preprocessing_wins_and_is_saved(tmp_path):
    original = tiny_original(is_native=False)
    folder = write(tmp_path / "in", original.state_dict(), original.config.to_dict())
    config = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "size": {"shortest_edge": 12}}
    config |= {"crop_size": {"height": 12, "width": 12}, "resample": 2, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    encoder = nopad.load(folder)
    encoder.save_pretrained(tmp_path / "out")
    for loaded in (encoder, nopad.load(tmp_path / "out")):
        assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)
        assert loaded.preprocessing.size == 12
    pack = encoder.pack([torch.randint(0, 255, (3, 40, 30), dtype=torch.uint8)])
    assert pack.grid_thw.tolist() == [[1, 3, 3]]


def test_duplicate_weights_with_and_without_prefix(tmp_path):
    original = tiny_original()
    state = original.state_dict()
    twice = {**state, **{f"vision_model.{name}": tensor.clone() for name, tensor in state.items()}}
    with pytest.raises(ValueError, match="with and without prefix"):
        nopad.load(write(tmp_path, twice, original.config.to_dict()))


def test_a_folder_with_two_weights_files_is_an_error_that_names_both(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"\['a\.safetensors', 'b\.safetensors'\]"):
        nopad.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x80\x02"])
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        nopad.load(tmp_path / name)
