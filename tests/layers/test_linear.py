"""Linear maps of one input are one GEMM where nobody can tell, and parameters of their own everywhere else."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nopad.layers.linear import SharedInput, is_plain, joined


class Maps(SharedInput):
    """Three linear maps of one input, registered under other names than their roles."""

    siblings = ("q", "k", "v")
    names = {"q": "a", "k": "b", "v": "c"}  # noqa: RUF012

    def __init__(self, *biases, sizes=(8, 8, 8)):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, size, bias=bias) for size, bias in zip(sizes, biases, strict=True))

    def multiply_each(self, rows):
        joint = self.multiply_at_once(rows)
        return (self.q(rows), self.k(rows), self.v(rows)) if joint is None else joint.chunk(3, dim=1)

    def one_by_one(self, rows):
        return [linear(rows).detach() for linear in (self.q, self.k, self.v)]


def laid(*biases):
    maps = Maps(*biases)
    maps.lay_out()
    assert maps._one_gemm is not None
    return maps


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "biases", [(True, True, True), (False, False, False), (True, False, True), (False, True, False)]
)
def test_side_by_side_they_give_what_each_gives(biases):
    maps, rows = Maps(*map(bool, biases)), torch.randn(5, 8)
    expected = maps.one_by_one(rows)
    state = {name: tensor.clone() for name, tensor in maps.state_dict().items()}
    maps.lay_out()
    assert maps._one_gemm.weight.shape == (24, 8)
    assert (maps._one_gemm.bias is not None) == any(biases)
    with torch.no_grad():
        assert_same(maps.multiply_each(rows), expected)
    assert state.keys() == maps.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in maps.state_dict().items())


def test_one_gemm_without_gradients_and_one_each_with_them(monkeypatch):
    maps, rows, seen = laid(True, True, True), torch.randn(5, 8), []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b: seen.append(tuple(w.shape)) or linear(x, w, b))
    with torch.no_grad():
        maps.multiply_each(rows)
    maps.multiply_each(rows)
    assert seen == [(24, 8), (8, 8), (8, 8), (8, 8)]


def test_training_writes_to_each_and_the_gemm_reads_it():
    maps, rows = laid(True, False, True), torch.randn(5, 8)
    optimizer = torch.optim.AdamW(maps.parameters(), lr=0.1)
    sum(part.square().sum() for part in maps.multiply_each(rows)).backward()
    optimizer.step()
    with torch.no_grad():
        assert maps._one_gemm.is_current(maps)
        assert_same(maps.multiply_each(rows), maps.one_by_one(rows))
    assert not maps._one_gemm.bias[8:16].any()  # in place of the bias that is missing


def hook(maps):
    maps.k.register_forward_hook(lambda module, arguments, output: output * 2)


def hook_before(maps):
    maps.k.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,))


def parametrize(maps):
    nn.utils.parametrize.register_parametrization(maps.k, "weight", nn.Softplus(), unsafe=True)


def another_forward(maps):
    maps.k.forward = lambda rows: rows * 2


def another_class(maps):
    maps.b = type("Doubling", (nn.Linear,), {"forward": lambda self, rows: rows * 2})(8, 8)


def another_map(maps):
    maps.k = nn.Linear(8, 8)


def other_memory(maps):
    maps.k.weight.data = torch.randn(8, 8)


def other_memory_of_a_bias(maps):
    maps.k.bias.data = torch.randn(8)


def another_weight(maps):
    maps.k.weight = nn.Parameter(torch.randn(8, 8))


def another_bias(maps):
    maps.k.bias = nn.Parameter(torch.randn(8))


def no_bias(maps):
    maps.k.bias = None


@pytest.mark.parametrize(
    "change",
    [
        hook,
        hook_before,
        parametrize,
        another_forward,
        another_class,
        another_map,
        other_memory,
        other_memory_of_a_bias,
        another_weight,
        another_bias,
        no_bias,
    ],
)
def test_what_stands_before_a_map_or_replaces_it_is_called(change):
    maps, rows = laid(True, True, True), torch.randn(5, 8)
    change(maps)
    expected = maps.one_by_one(rows)
    with torch.no_grad():
        for a, b in zip(maps.multiply_each(rows), expected, strict=True):
            assert torch.equal(a, b)


def test_a_global_hook_sees_each():
    maps, seen = laid(True, True, True), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            maps.multiply_each(torch.randn(5, 8))
    finally:
        handle.remove()
    assert seen == [maps.q, maps.k, maps.v]


def test_autocast_which_keeps_the_casts_of_parameters_gets_each(monkeypatch):
    maps, seen, linear = laid(True, True, True), [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b: seen.append(tuple(w.shape)) or linear(x, w, b))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert {part.dtype for part in maps.multiply_each(torch.randn(5, 8))} == {torch.bfloat16}
    assert seen == [(8, 8)] * 3


@pytest.mark.parametrize("maps", [Maps(True, True, True, sizes=(8, 4, 8)), Maps(True, True, True).to("meta")])
def test_maps_that_do_not_fit_stay_as_they_are(maps):
    before = [linear.weight.data_ptr() for linear in (maps.q, maps.k, maps.v)]
    maps.lay_out()
    assert maps._one_gemm is None
    assert [linear.weight.data_ptr() for linear in (maps.q, maps.k, maps.v)] == before


def test_other_modules_are_not_plain():
    assert not is_plain(nn.Identity())


def test_made_in_inference_mode_they_can_be_trained_later():
    maps = Maps(True, True, True)
    with torch.inference_mode():
        maps.lay_out()
    sum(part.sum() for part in maps.multiply_each(torch.randn(5, 8))).backward()
    assert maps.k.weight.grad is not None


def test_moved_cast_copied_and_pickled_ones_lie_side_by_side():
    maps, rows = laid(True, False, True), torch.randn(5, 8)
    expected = maps.one_by_one(rows)
    for twin in (copy.deepcopy(maps), pickle.loads(pickle.dumps(maps)), copy.deepcopy(maps).double().float()):
        assert twin._one_gemm.is_current(twin)
        assert twin._one_gemm.weight.data_ptr() != maps._one_gemm.weight.data_ptr()
        with torch.no_grad():
            assert_same(twin.multiply_each(rows), expected)
    assert maps._one_gemm.is_current(maps)


def test_saved_they_are_weights_as_any(tmp_path):
    maps = laid(True, False, True)
    state = maps.state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pth")
    for again in (load_file(tmp_path / "weights.safetensors"), torch.load(tmp_path / "weights.pth")):
        assert again.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())


def test_each_parameter_has_a_storage_of_its_own():
    maps = laid(True, False, True)
    storages = {parameter.untyped_storage().data_ptr() for parameter in maps.parameters()}
    assert len(storages) == len(list(maps.parameters())) == 5
    for parameter in maps.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert parameter.storage_offset() == 0


def test_memory_that_processes_share_is_left_shared():
    maps, rows = laid(True, True, True), torch.randn(5, 8)
    expected = maps.one_by_one(rows)
    maps.share_memory()
    assert all(parameter.is_shared() for parameter in maps.parameters())
    with torch.no_grad():
        assert_same(maps.multiply_each(rows), expected)
    maps.to(torch.float32)
    assert all(parameter.is_shared() for parameter in maps.parameters())


def test_laid_out_again_they_are_not_moved():
    maps = laid(True, True, True)
    before = [parameter.data_ptr() for parameter in maps.parameters()]
    maps.to("cpu")
    maps.lay_out()
    assert [parameter.data_ptr() for parameter in maps.parameters()] == before


def test_joined_is_a_copy_with_zeros_for_missing_biases():
    maps, rows = laid(True, False, True), torch.randn(5, 8)
    one = joined((maps.q, maps.k, maps.v))
    torch.testing.assert_close(one(rows), torch.cat(maps.one_by_one(rows), dim=1))
    assert not any(parameter.requires_grad for parameter in one.parameters())
    one.weight.zero_()
    assert maps.q.weight.any()
    assert joined((nn.Linear(8, 8, bias=False),)).bias is None
