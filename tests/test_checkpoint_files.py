"""The files of a checkpoint: which are read, and what is said of those that hold something else."""

import json
import os
import pickle
import resource
import struct
import tarfile
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import tiny

import nopad
from nopad import cli
from nopad.checkpoints.contents import read_tensors
from nopad.checkpoints.files import open_checkpoint
from nopad.families.aimv2 import AIMv2Packing


@pytest.fixture
def folder(tmp_path):
    return tiny("aimv2", tmp_path / "aimv2")


def refused(folder, expected, capsys=None):
    with pytest.raises(ValueError, match=expected):
        nopad.load(folder)
    if capsys is not None:
        assert cli.main(["align", str(folder)]) == 2
        assert "Traceback" not in capsys.readouterr().err


def shard(folder, suffix=".safetensors"):
    """The weights in two files and an index; returns the weights, the map, and a function that writes it."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {name: f"{'ab'[number % 2]}{suffix}" for number, name in enumerate(names)}
    for file in ("a", "b"):
        part = {name: tensor for name, tensor in state.items() if weight_map[name] == f"{file}{suffix}"}
        save_file(part, folder / f"{file}{suffix}") if suffix != ".bin" else torch.save(part, folder / f"{file}.bin")
    index = "model.safetensors.index.json" if suffix != ".bin" else "pytorch_model.bin.index.json"

    def write(**changes):
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {**weight_map, **changes}}))

    write()
    return state, weight_map, write


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_read_as_the_index_says(folder, suffix):
    state, *_ = shard(folder, suffix)
    stranger = folder / f"c{suffix}"  # a file that the index does not name is not read
    stranger.write_bytes(b"junk")
    loaded = nopad.load(folder).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_links_are_followed_as_in_the_cache_of_the_hub(folder, tmp_path):
    state, *_ = shard(folder)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = tmp_path / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, folder))
    assert torch.equal(nopad.load(folder).state_dict()["rms_norm.weight"], state["rms_norm.weight"])


def test_a_tensor_in_another_file_than_the_index_says(folder, capsys):
    state, weight_map, write = shard(folder)
    name = next(name for name in weight_map if weight_map[name] == "a.safetensors")
    held = load_file(folder / "b.safetensors")
    save_file({**held, name: state[name] * 0}, folder / "b.safetensors")
    refused(folder, rf"index.json: b\.safetensors holds tensors .* \{{'{name}': 'a.safetensors'\}}", capsys)
    save_file({**held, "unnamed": state[name]}, folder / "b.safetensors")
    refused(folder, r"index.json: b\.safetensors holds tensors .* \{'unnamed': None\}")
    save_file(held, folder / "b.safetensors")
    write(gone="b.safetensors")
    refused(folder, r"index.json: b\.safetensors lacks 1: \['gone'\]")


@pytest.mark.parametrize("where", ["../outside", "sub/a", "{folder}/a", "{folder}/../outside", "..\\outside", "a\0"])
def test_an_index_names_files_beside_it_alone(folder, where, capsys):
    _, weight_map, write = shard(folder)
    (folder / "sub").mkdir()
    for copy in (folder.parent / "outside.safetensors", folder / "sub" / "a.safetensors"):
        copy.write_bytes((folder / "a.safetensors").read_bytes())
    where = where.format(folder=folder) + ".safetensors"
    write(**{name: where for name, file in weight_map.items() if file == "a.safetensors"})
    refused(folder, r"index\.json: expected names of \.safetensors files beside it, got \['", capsys)


def test_an_index_of_safetensors_names_no_pickles(folder):
    _, weight_map, write = shard(folder)
    torch.save(load_file(folder / "a.safetensors"), folder / "a.bin")
    write(**{name: "a.bin" for name, file in weight_map.items() if file == "a.safetensors"})
    refused(folder, r"expected names of \.safetensors files beside it, got \['a\.bin'\]")


def test_one_file_goes_before_an_index_as_in_transformers(folder):
    whole = (folder / "model.safetensors").read_bytes()
    shard(folder)
    (folder / "a.safetensors").write_bytes(b"junk")
    (folder / "model.safetensors").write_bytes(whole)
    nopad.load(folder)


NO_FILES = {
    "a folder": lambda path: path.mkdir(),
    "a named pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.safetensors.index.json", "other.safetensors", "config.json", "processor_config.json"],
)
def test_what_is_named_like_a_file_and_is_none(folder, name, kind, capsys):
    if name != "model.safetensors.index.json":
        (folder / name).unlink(missing_ok=True)
    if name != "config.json" and name != "processor_config.json":
        (folder / "model.safetensors").unlink(missing_ok=True)
    NO_FILES[kind](folder / name)
    expected = kind if "itself" not in kind else "Too many levels of symbolic links"
    refused(folder, rf"{name}': expected a file, got .*{expected}", capsys)
    refused(folder / name, "expected|no weights there") if name.endswith(
        ".safetensors"
    ) and kind != "a folder" else None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "Expecting value"),
        (b"[1]", "a JSON object, got list"),
        (b"5", "a JSON object, got int"),
        (b"null", "a JSON object, got NoneType"),
        (b'{"a": "\xff"}', "codec can't decode"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": 1, "a": 2}', r"different values of one key: \['a'\]"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b'{"a":' * 100_000, "recursion depth"),
        (b'{"a":' * 60 + b"1" + b"}" * 60, "in each other, more than 50 deep"),
        (b"[" * 60 + b"]" * 60, "in each other, more than 50 deep"),
        (b" " * (16 << 20) + b"{}", "at most 16777216 bytes of JSON, got 16777218"),
    ],
)
def test_json_that_is_none(folder, name, content, expected, capsys):
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    refused(folder, rf"{name}: expected .*{expected}", capsys)


def test_a_key_twice_with_one_value_is_no_damage(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:-1] + ', "patch_size": 4}')
    nopad.load(folder)


def header(content, length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected safetensors, got"),
        (b"\0" * 7, "expected safetensors, got"),
        (header({}, length=1 << 62), f"expected safetensors with a header of at most 16777216 bytes, got {1 << 62}"),
        (header({}, length=50), "expected safetensors, got"),
        (header(b'{"a":' * 100_000), "expected safetensors, got .*recursion"),
        (header(b'{"\xff": 1}'), "expected safetensors, got"),
        (header({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}) + bytes(4), "expected safetensors, got .*offset"),
        (header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}) + bytes(12), "expected safetensors, got .*offset"),
        (header({"a": entry([-1], 0, 4)}) + bytes(4), "expected safetensors, got"),
        (header({"a": entry([1 << 40, 1 << 40], 0, 4)}) + bytes(4), "expected safetensors, got .*overflow"),
        (header({"a": entry([1], 0, 4)}), "expected safetensors, got"),
        (header({"a": entry([1], 0, 4, "F5")}) + bytes(4), "expected safetensors, got"),
    ],
)
def test_safetensors_that_are_none(folder, content, expected, capsys):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, rf"model\.safetensors': {expected}", capsys)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_large_file_that_is_damaged_is_not_read_whole(folder):
    before = peak()
    os.truncate(folder / "model.safetensors", 3 << 30)  # sparse
    refused(folder, "expected safetensors, got")
    os.truncate(folder / "model.safetensors", 0)
    os.truncate(folder / "model.safetensors", 3 << 30)
    refused(folder, "expected safetensors, got")
    assert peak() - before < 1 << 30


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn)


def test_a_copy_has_the_bits_of_the_mapped_file(tmp_path):
    values = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in DTYPES}
    values |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    save_file(values, tmp_path / "a.safetensors")
    for name, tensor in read_tensors(tmp_path / "a.safetensors").items():
        assert (tensor.shape, tensor.dtype) == (tuple(values[name].shape), values[name].dtype)
        for copy in (tensor[...], tensor.read()):
            assert copy.view(-1).view(torch.uint8).equal(values[name].view(-1).view(torch.uint8))
        assert not tensor.shape or tensor[1:].equal(values[name][1:])


def test_a_copy_is_of_the_file_that_was_opened(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4)}, path)
    opened = read_tensors(path)["a"]
    save_file({"a": torch.zeros(4)}, tmp_path / "b.safetensors")
    os.replace(tmp_path / "b.safetensors", path)
    assert opened[...].equal(torch.ones(4))


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4096)}, path)
    opened = read_tensors(path)["a"]
    os.truncate(path, 8192)
    with pytest.raises(ValueError, match="the file has been cut off"):
        opened[...]


def test_whole_tensors_are_read_past_the_mapped_file(folder):
    part = AIMv2Packing.original_dialect().convert(open_checkpoint(str(folder)))
    assert all(tensor.copy is not None for tensor in part.tensors.values())


@pytest.fixture
def pickled(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return state


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_both_formats_load(folder, pickled, zipped):
    wrapped = OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in pickled.items())
    torch.save(wrapped, folder / "model.pth", _use_new_zipfile_serialization=zipped)
    loaded = nopad.load(folder).state_dict()
    assert all(torch.equal(loaded[name], pickled[name]) for name in pickled)
    (folder / "model.pth").write_bytes(b"")  # the weights in use are no view of the file
    assert all(torch.equal(loaded[name], pickled[name]) for name in pickled)


def strided(tensor, size):
    return tensor.flatten()[:1].as_strided((size,), (0,))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (1, torch.zeros(1), r"expected strings as names, got \[1\]"),
        (("a", 1), torch.zeros(1), "expected strings as names"),
        ("a", {"b": torch.zeros(1)}, "expected a flat dict of tensors"),
        ("a", torch.zeros(1, device="meta"), "expected tensors and nothing else, got .*meta"),
        ("a", torch.zeros(2, 2).to_sparse(), "expected tensors and nothing else, got .*sparse"),
        ("a", bytearray(4), "expected tensors and nothing else, got .*bytearray"),
        ("a", len, "expected tensors and nothing else, got .*len"),
        ("a", strided(torch.zeros(1), 10**12), "expected at most twice the file's .* as values, got 4"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_anything_but_named_tensors(folder, pickled, name, value, expected, zipped, capsys):
    torch.save({**pickled, name: value}, folder / "model.pth", _use_new_zipfile_serialization=zipped)
    refused(folder, rf"model\.pth': {expected}", capsys)


class Large:
    def __reduce__(self):
        return bytearray, (8 << 30,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_memory_gets_none(folder, pickled, zipped):
    torch.save({**pickled, "a": Large()}, folder / "model.pth", _use_new_zipfile_serialization=zipped)
    before = peak()
    refused(folder, "expected tensors and nothing else, got .*builtin.*bytearray")
    assert peak() - before < 1 << 30


def test_a_compressed_pickle_is_not_inflated(folder, pickled, tmp_path):
    torch.save(pickled, tmp_path / "stored.pth")
    with zipfile.ZipFile(tmp_path / "stored.pth") as stored, zipfile.ZipFile(folder / "model.pth", "w") as deflated:
        for item in stored.infolist():
            deflated.writestr(item.filename, stored.read(item), compress_type=zipfile.ZIP_DEFLATED)
    refused(folder, "expected tensors and nothing else, got compressed entries")


@pytest.mark.parametrize("opcode", [b"\x8d", b"\x8e", b"\x96", b"\x8b", b"T"])
def test_a_length_that_a_pickle_claims_is_not_allocated(folder, pickled, opcode, capsys):
    (folder / "model.pth").write_bytes(b"\x80\x04" + opcode + b"\xff\xff\xff\x7f" + b"\0" * 8)
    before = peak()
    refused(folder, r"model\.pth': expected tensors and nothing else, got", capsys)
    assert peak() - before < 1 << 28


def test_a_line_of_a_pickle_is_not_read_whole(folder, pickled):
    with (folder / "model.pth").open("wb") as file:
        file.write(b"V")
        file.truncate(3 << 30)
    before = peak()
    refused(folder, "expected tensors and nothing else, got")
    assert peak() - before < 1 << 28


def test_a_pickle_of_another_protocol_or_damaged(folder, pickled, capsys):
    for content in (pickle.dumps({"a": 1}), pickle.dumps([1] * 100)[:-20], b"\x80", b"PK\x03\x04junk", b"("):
        (folder / "model.pth").write_bytes(content)
        refused(folder, r"model\.pth': expected tensors and nothing else, got", capsys)


def test_a_tar_is_not_opened_though_it_begins_as_pickles_do(folder):
    """torch opens it as one; its attributes take tarfile a time that grows with their square."""
    attributes = tarfile.TarInfo("N." * 5)  # five pickles of None
    attributes.type, attributes.size = tarfile.XHDTYPE, 1 << 20
    payload = (b"5 aaa" * (1 << 18))[: attributes.size - 1] + b"="
    (folder / "model.pth").write_bytes(attributes.tobuf() + payload + tarfile.TarInfo("storages").tobuf())
    (folder / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"model\.pth.*got a tar"):
        nopad.load(folder)
