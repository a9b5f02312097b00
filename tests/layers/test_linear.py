"""Linear layers of one input: one GEMM where nothing else has to run, single layers elsewhere."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from nopad.layers.linear import StackedLinears, is_plain_linear, joined


class Layers(StackedLinears):
    """Three linear layers of one input, registered under other names than their roles."""

    siblings = ("q", "k", "v")
    names = {"q": "a", "k": "b", "v": "c"}  # noqa: RUF012

    def __init__(self, *biases, sizes=(8, 8, 8)):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, size, bias=bias) for size, bias in zip(sizes, biases, strict=True))

    def multiply_each(self, rows):
        joint = self.stacked_forward(rows)
        return (self.q(rows), self.k(rows), self.v(rows)) if joint is None else joint.chunk(3, dim=1)

    def one_by_one(self, rows):
        return [linear(rows).detach() for linear in (self.q, self.k, self.v)]


def laid_out(*biases):
    layers = Layers(*biases)
    layers.stack_weights()
    assert layers._stacked is not None
    return layers


def assert_close(outputs, expected):
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "biases", [(True, True, True), (False, False, False), (True, False, True), (False, True, False)]
)
def test_joint_gemm_equals_single_layers(biases):
    layers, rows = Layers(*map(bool, biases)), torch.randn(5, 8)
    expected = layers.one_by_one(rows)
    state = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    layers.stack_weights()
    assert layers._stacked.weight.shape == (24, 8)
    assert (layers._stacked.bias is not None) == any(biases)
    with torch.no_grad():
        assert_close(layers.multiply_each(rows), expected)
    assert state.keys() == layers.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in layers.state_dict().items())


def test_joint_gemm_runs_only_without_gradients(monkeypatch):
    layers, rows, seen = laid_out(True, True, True), torch.randn(5, 8), []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b: seen.append(tuple(w.shape)) or linear(x, w, b))
    with torch.no_grad():
        layers.multiply_each(rows)
    layers.multiply_each(rows)
    assert seen == [(24, 8), (8, 8), (8, 8), (8, 8)]


def test_joint_gemm_reads_trained_weights():
    layers, rows = laid_out(True, False, True), torch.randn(5, 8)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.1)
    sum(part.square().sum() for part in layers.multiply_each(rows)).backward()
    optimizer.step()
    with torch.no_grad():
        assert layers._stacked.is_current(layers)
        assert_close(layers.multiply_each(rows), layers.one_by_one(rows))
    assert not layers._stacked.bias[8:16].any()  # for the missing bias


def hook(layers):
    layers.k.register_forward_hook(lambda module, arguments, output: output * 2)


def hook_before(layers):
    layers.k.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2,))


def parametrize(layers):
    nn.utils.parametrize.register_parametrization(layers.k, "weight", nn.Softplus(), unsafe=True)


def another_forward(layers):
    layers.k.forward = lambda rows: rows * 2


def another_class(layers):
    layers.b = type("Doubling", (nn.Linear,), {"forward": lambda self, rows: rows * 2})(8, 8)


def another_map(layers):
    layers.k = nn.Linear(8, 8)


def other_memory(layers):
    layers.k.weight.data = torch.randn(8, 8)


def other_memory_of_a_bias(layers):
    layers.k.bias.data = torch.randn(8)


def another_weight(layers):
    layers.k.weight = nn.Parameter(torch.randn(8, 8))


def another_bias(layers):
    layers.k.bias = nn.Parameter(torch.randn(8))


def no_bias(layers):
    layers.k.bias = None


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
def test_changed_layer_is_called(change):
    layers, rows = laid_out(True, True, True), torch.randn(5, 8)
    change(layers)
    expected = layers.one_by_one(rows)
    with torch.no_grad():
        for a, b in zip(layers.multiply_each(rows), expected, strict=True):
            assert torch.equal(a, b)


def test_global_hook_sees_each_layer():
    layers, seen = laid_out(True, True, True), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            layers.multiply_each(torch.randn(5, 8))
    finally:
        handle.remove()
    assert seen == [layers.q, layers.k, layers.v]


def test_autocast_runs_layers_one_by_one(monkeypatch):
    layers, seen, linear = laid_out(True, True, True), [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b: seen.append(tuple(w.shape)) or linear(x, w, b))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert {part.dtype for part in layers.multiply_each(torch.randn(5, 8))} == {torch.bfloat16}
    assert seen == [(8, 8)] * 3


@pytest.mark.parametrize("layers", [Layers(True, True, True, sizes=(8, 4, 8)), Layers(True, True, True).to("meta")])
def test_layers_of_other_sizes_or_devices_are_not_moved(layers):
    before = [linear.weight.data_ptr() for linear in (layers.q, layers.k, layers.v)]
    layers.stack_weights()
    assert layers._stacked is None
    assert [linear.weight.data_ptr() for linear in (layers.q, layers.k, layers.v)] == before


def test_other_modules_are_not_plain():
    assert not is_plain_linear(nn.Identity())


def test_layout_made_in_inference_mode_can_be_trained():
    layers = Layers(True, True, True)
    with torch.inference_mode():
        layers.stack_weights()
    sum(part.sum() for part in layers.multiply_each(torch.randn(5, 8))).backward()
    assert layers.k.weight.grad is not None


def test_moved_cast_copied_and_pickled_layers_lie_side_by_side():
    layers, rows = laid_out(True, False, True), torch.randn(5, 8)
    expected = layers.one_by_one(rows)
    for twin in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers)), copy.deepcopy(layers).double().float()):
        assert twin._stacked.is_current(twin)
        assert twin._stacked.weight.data_ptr() != layers._stacked.weight.data_ptr()
        with torch.no_grad():
            assert_close(twin.multiply_each(rows), expected)
    assert layers._stacked.is_current(layers)


def test_copy_that_shares_parameters_shares_their_joint_weight():
    layers, rows = laid_out(True, False, True), torch.randn(5, 8)
    twin = copy.deepcopy(layers, {id(parameter): parameter for parameter in layers.parameters()})
    assert twin.q.weight is layers.q.weight
    assert twin._stacked.weight is layers._stacked.weight
    assert twin._stacked.is_current(twin)
    assert layers._stacked.is_current(layers)
    with torch.no_grad():
        layers.q.weight.mul_(2)
        assert_close(twin.multiply_each(rows), layers.one_by_one(rows))


def test_pickle_holds_each_weight_once():
    layers, separate = laid_out(True, True, True), laid_out(True, True, True)
    separate.__dict__.pop("_stacked")
    assert len(pickle.dumps(layers)) < len(pickle.dumps(separate)) + 200


def test_laid_out_weights_are_saved_one_by_one(tmp_path):
    layers = laid_out(True, False, True)
    state = layers.state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pth")
    for again in (load_file(tmp_path / "weights.safetensors"), torch.load(tmp_path / "weights.pth")):
        assert again.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())


def test_each_parameter_has_its_own_storage():
    layers = laid_out(True, False, True)
    storages = {parameter.untyped_storage().data_ptr() for parameter in layers.parameters()}
    assert len(storages) == len(list(layers.parameters())) == 5
    for parameter in layers.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert parameter.storage_offset() == 0


def test_shared_memory_is_left_shared():
    layers, rows = laid_out(True, True, True), torch.randn(5, 8)
    expected = layers.one_by_one(rows)
    layers.share_memory()
    assert all(parameter.is_shared() for parameter in layers.parameters())
    with torch.no_grad():
        assert_close(layers.multiply_each(rows), expected)
    layers.to(torch.float32)
    assert all(parameter.is_shared() for parameter in layers.parameters())


def test_second_lay_out_does_not_move_weights():
    layers = laid_out(True, True, True)
    before = [parameter.data_ptr() for parameter in layers.parameters()]
    layers.to("cpu")
    layers.stack_weights()
    assert [parameter.data_ptr() for parameter in layers.parameters()] == before


def test_joined_is_a_copy_with_zeros_for_missing_biases():
    layers, rows = laid_out(True, False, True), torch.randn(5, 8)
    one = joined((layers.q, layers.k, layers.v))
    torch.testing.assert_close(one(rows), torch.cat(layers.one_by_one(rows), dim=1))
    assert not any(parameter.requires_grad for parameter in one.parameters())
    one.weight.zero_()
    assert layers.q.weight.any()
    assert joined((nn.Linear(8, 8, bias=False),)).bias is None


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
        lambda linear: prune.random_unstructured(linear, "bias", 0.5),
        torch.nn.utils.weight_norm,
    ],
    ids=["pruned weight", "pruned bias", "weight_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_layers_whose_parameters_were_replaced_run_one_by_one(change):
    layers, rows = laid_out(True, True, True), torch.randn(5, 8)
    change(layers.q)
    expected = layers.one_by_one(rows)
    assert not is_plain_linear(layers.q)
    with torch.no_grad():
        assert_close(layers.multiply_each(rows), expected)
        assert_close(layers.to(torch.float32).multiply_each(rows), expected)
    assert layers._stacked is None
