"""Linear4bit: state, round trips, forward and backward."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qlora_native as qn
from qlora_native.nn import Linear4bit

SHAPES = [(8, 64), (5, 37), (1, 1), (3, 130), (300, 256), (7, 2)]
SETTINGS = [
    {},
    {"double_quant": False},
    {"quant_type": "fp4", "block_size": 32},
    {"quant_type": "int4", "block_size": 128, "double_quant": False},
    {"quant_type": "custom", "codebook": tuple(i / 8 - 1 for i in range(16))},
]
STATE = ("weight", "weight_absmax", "weight_absmax2")


def dense(out_features=5, in_features=37, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def empty_like(layer: Linear4bit, **arguments) -> Linear4bit:
    return Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        quant_type=layer.quant_type,
        block_size=layer.block_size,
        double_quant=layer.double_quant,
        codebook=layer.codebook,
        **arguments,
    )


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_from_linear_holds_the_bytes_of_quantize_4bit(shape, settings):
    linear = dense(*shape)
    layer = Linear4bit.from_linear(linear, **settings)
    q = qn.quantize_4bit(linear.weight, **settings)
    assert layer.weight.shape == (
        (shape[0], shape[1] // 2) if shape[1] % 2 == 0 else q.packed.shape
    )
    assert torch.equal(layer.weight.view(-1), q.packed)
    view = layer.quantized_weight()
    for name in ("absmax", "absmax2", "offset"):
        ours, expected = getattr(view, name), getattr(q, name)
        assert (ours is None and expected is None) or torch.equal(ours, expected), name
    assert torch.equal(layer.dequantize(), q.dequantize())
    assert layer.W_q is layer.weight


@pytest.mark.parametrize("double_quant", [True, False])
def test_quantized_weight_is_a_view(double_quant):
    layer = Linear4bit.from_linear(dense(300, 256), double_quant=double_quant)
    q = layer.quantized_weight()
    storages = {
        getattr(layer, n).untyped_storage().data_ptr()
        for n in STATE
        if getattr(layer, n) is not None
    }
    parts = [part for part in (q.packed, q.absmax, q.absmax2, q.offset) if part is not None]
    assert len(parts) == (4 if double_quant else 2)
    assert {part.untyped_storage().data_ptr() for part in parts} == storages


def test_state_is_frozen_uint8_and_the_bias_is_the_same_parameter():
    linear = dense()
    layer = Linear4bit.from_linear(linear)
    assert isinstance(layer, nn.Linear)
    for name in STATE:
        parameter = getattr(layer, name)
        assert parameter.dtype == torch.uint8
        assert isinstance(parameter, nn.Parameter)
        assert not parameter.requires_grad
    assert layer.bias is linear.bias
    assert layer.bias.requires_grad
    assert Linear4bit.from_linear(dense(), double_quant=False).weight_absmax2 is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_dense_layer_with_the_decoded_weight(shape, bias, dtype):
    layer = Linear4bit.from_linear(dense(*shape, bias=bias, dtype=dtype))
    x = torch.randn(2, 3, shape[1], dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    expected = F.linear(
        x.double(), layer.dequantize(torch.float32).double(), layer.bias.double() if bias else None
    )
    # The weight is rounded to dtype before the product, and the result after it: a few ulps.
    bound = 4 * torch.finfo(dtype).eps * (1 + x.double().abs().sum(-1, keepdim=True))
    assert ((y.double() - expected).abs() <= bound).all()


def test_compute_dtype_casts_in_and_back():
    linear = dense(9, 64)
    layer = Linear4bit.from_linear(linear, compute_dtype=torch.bfloat16)
    x = torch.randn(4, 64, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.float32
    plain = Linear4bit.from_linear(linear)
    assert torch.equal(y, plain(x.bfloat16()).float())
    assert not torch.equal(y, plain(x))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_gradients_against_dense_autograd():
    layer = Linear4bit.from_linear(dense(5, 37))
    x = torch.randn(2, 3, 37, requires_grad=True)
    g = torch.randn(2, 3, 5)
    layer(x).backward(g)
    x64 = x.detach().double().requires_grad_()
    bias64 = layer.bias.detach().double().requires_grad_()
    F.linear(x64, layer.dequantize().double(), bias64).backward(g.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad.double(), bias64.grad, rtol=1e-5, atol=1e-5)


def test_no_dense_weight_is_saved_for_backward():
    layer = Linear4bit.from_linear(dense(40, 64, bias=False))
    x = torch.randn(2, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    storages = {getattr(layer, name).untyped_storage().data_ptr() for name in STATE}
    assert saved
    assert all(t.untyped_storage().data_ptr() in storages for t in saved)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(8, 64), (5, 37), (300, 256)])
def test_state_dict_round_trip(shape, settings, assign):
    layer = Linear4bit.from_linear(dense(*shape), **settings)
    other = empty_like(layer)
    assert other.load_state_dict(layer.state_dict(), strict=True, assign=assign)
    assert same_state(layer, other)
    x = torch.randn(3, shape[1])
    assert torch.equal(layer(x), other(x))


def test_torch_save_of_a_state_dict_loads_with_weights_only():
    layer = nn.Sequential(Linear4bit.from_linear(dense()), nn.ReLU())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = nn.Sequential(empty_like(layer[0]), nn.ReLU())
    other.load_state_dict(state)
    assert same_state(layer, other)
    # The settings travelled along: a layer of another type refuses what has the same shapes.
    fp4 = nn.Sequential(Linear4bit(37, 5, quant_type="fp4"), nn.ReLU())
    before = copy.deepcopy(fp4.state_dict())
    with pytest.raises(RuntimeError, match=r"0\.weight was quantized with quant_type='nf4'.*'fp4'"):
        fp4.load_state_dict(state)
    assert all(torch.equal(before[k], v) for k, v in fp4.state_dict().items())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(copier):
    layer = Linear4bit.from_linear(dense(), compute_dtype=torch.bfloat16).eval()
    other = copier(layer)
    assert same_state(layer, other)
    assert str(other) == str(layer)
    assert other.training is False
    other.weight.zero_()
    assert layer.weight.any()


def test_meta_layer_is_filled_by_assigning():
    layer = Linear4bit.from_linear(dense())
    other = empty_like(layer, device="meta")
    assert all(p.is_meta for p in other.parameters())
    other.load_state_dict(layer.state_dict(), assign=True)
    assert same_state(layer, other)
    assert not any(p.requires_grad for n, p in other.named_parameters() if n != "bias")


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_leave_the_packed_state_alone(cast):
    layer = Linear4bit.from_linear(dense(dtype=torch.float16))
    before = copy.deepcopy(layer.state_dict())
    getattr(layer, cast)()
    assert all(torch.equal(getattr(layer, n), before[n]) for n in STATE)
    assert layer.bias.dtype == getattr(
        torch, {"float": "float32", "half": "float16", "double": "float64"}.get(cast, cast)
    )
    assert layer.weight_dtype == layer.dequantize().dtype == torch.float16


@pytest.mark.parametrize("double_quant", [True, False])
def test_every_device_holds_the_same_bytes(device, double_quant):
    linear = dense(300, 256)
    expected = Linear4bit.from_linear(linear, double_quant=double_quant)
    made_there = Linear4bit.from_linear(linear, double_quant=double_quant, device=device)
    moved = copy.deepcopy(expected).to(device)
    x = torch.randn(3, 256)
    for layer in (made_there, moved):
        assert {p.device.type for p in layer.parameters()} == {device}
        assert all(
            torch.equal(v.cpu(), expected.state_dict()[k]) for k, v in layer.state_dict().items()
        )
        torch.testing.assert_close(layer(x.to(device)).cpu(), expected(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(moved.dequantize().cpu(), expected.dequantize())


def test_requantize_writes_into_the_same_storage():
    layer = Linear4bit.from_linear(dense(seed=0))
    addresses = [getattr(layer, n).data_ptr() for n in STATE]
    new = dense(seed=1).weight
    assert layer.requantize_(new) is layer
    assert [getattr(layer, n).data_ptr() for n in STATE] == addresses
    assert torch.equal(layer.dequantize(), qn.quantize_4bit(new).dequantize())


def test_requantize_refuses_and_leaves_the_layer_alone():
    layer = Linear4bit.from_linear(dense())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"\(37, 5\).*\(5, 37\)"):
        layer.requantize_(torch.zeros(37, 5))
    with pytest.raises(ValueError, match=r"holds 2 values"):
        layer.requantize_(torch.tensor([float("nan"), float("inf")] + [0.0] * 183).view(5, 37))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_check_finite():
    linear = dense()
    linear.weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match="1 values"):
        Linear4bit.from_linear(linear)
    assert Linear4bit.from_linear(linear, check_finite=False).dequantize().isnan().any()


def test_state_dict_mistakes_name_the_tensor():
    layer = Linear4bit(64, 8)
    dense_state = dense(8, 64).state_dict()
    with pytest.raises(
        RuntimeError, match=r"weight is torch\.float32, expected packed torch\.uint8"
    ):
        layer.load_state_dict(dense_state)
    # Without metadata, as from a file: shapes are all there is.
    other = dict(Linear4bit.from_linear(dense(8, 64), block_size=32).state_dict())
    with pytest.raises(
        RuntimeError, match=r"weight_absmax has shape \(16,\), expected \(8,\) for \[8, 64\]"
    ):
        layer.load_state_dict(other)
    single = dict(Linear4bit.from_linear(dense(8, 64), double_quant=False).state_dict())
    with pytest.raises(RuntimeError, match="weight_absmax"):
        layer.load_state_dict(single)
    missing = Linear4bit.from_linear(dense(8, 64)).state_dict()
    del missing["weight_absmax2"]
    with pytest.raises(RuntimeError, match="weight_absmax2"):
        layer.load_state_dict(missing)


@pytest.mark.parametrize(
    "arguments",
    [{"block_size": 32}, {"quant_type": "int4"}, {"double_quant": False}],
)
def test_metadata_catches_other_settings(arguments):
    state = Linear4bit.from_linear(dense(8, 64)).state_dict()
    name, value = next(iter(arguments.items()))
    with pytest.raises(
        RuntimeError, match=f"quantized with {name}=.*this layer has {name}={value!r}"
    ):
        Linear4bit(64, 8, **arguments).load_state_dict(state)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_misaligned_storage(shift, double_quant):
    layer = Linear4bit.from_linear(dense(), double_quant=double_quant)
    state = {}
    for name, tensor in layer.state_dict().items():
        raw = bytearray(
            b"?" * shift + bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        )
        # A view at an odd offset, as a slice of a mapped file is.
        moved = torch.frombuffer(raw, dtype=torch.uint8)[shift:]
        state[name] = moved if tensor.dtype == torch.uint8 else tensor
    other = empty_like(layer)
    other.load_state_dict(state, assign=True)
    x = torch.randn(2, 37)
    assert torch.equal(other(x), layer(x))
    # Put in place behind the module's back, as offloading hooks do.
    other._parameters["weight_absmax"] = nn.Parameter(state["weight_absmax"], requires_grad=False)
    assert torch.equal(other(x), layer(x))


def test_requires_grad_reaches_the_bias_only():
    layer = Linear4bit.from_linear(dense())
    layer.requires_grad_(False)
    assert not layer.bias.requires_grad
    assert layer.requires_grad_(True) is layer
    assert layer.bias.requires_grad
    assert not layer.weight.requires_grad
    nn.Sequential(layer).requires_grad_(False)
    assert not layer.bias.requires_grad


def test_share_memory_and_train_mode():
    layer = Linear4bit.from_linear(dense().eval())
    assert not layer.training
    y = layer(torch.ones(1, 37))
    layer.share_memory()
    assert layer.weight.is_shared()
    assert torch.equal(layer(torch.ones(1, 37)), y)


def test_constructor_refuses_bad_settings():
    with pytest.raises(ValueError, match="nf5"):
        Linear4bit(4, 4, quant_type="nf5")
    with pytest.raises(ValueError, match="48"):
        Linear4bit(4, 4, block_size=48)
    with pytest.raises(ValueError, match="codebook"):
        Linear4bit(4, 4, quant_type="custom")
    with pytest.raises(TypeError, match="Linear4bit"):
        Linear4bit.from_linear(Linear4bit(4, 4))
    with pytest.raises(ValueError, match="meta"):
        Linear4bit.from_linear(nn.Linear(4, 4, device="meta"))
    with pytest.raises(NotImplementedError, match="from_linear"):
        Linear4bit(4, 4).reset_parameters()


def test_wrong_input_names_both_shapes():
    layer = Linear4bit.from_linear(dense())
    with pytest.raises(ValueError, match=r"\(2, 36\).*\(5, 37\)"):
        layer(torch.zeros(2, 36))


def test_extra_repr_shows_the_settings():
    text = repr(Linear4bit(64, 8, quant_type="fp4", block_size=128, compute_dtype=torch.float16))
    for part in ("in_features=64", "out_features=8", "fp4", "128", "double_quant=True", "float16"):
        assert part in text


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles_without_graph_breaks(backend):
    layer = Linear4bit.from_linear(dense(8, 64))
    x = torch.randn(4, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    expected, x.grad = x.grad, None
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    out = compiled(x)
    assert torch.equal(out, y)
    out.sum().backward()
    assert torch.equal(x.grad, expected)


def test_autocast():
    layer = Linear4bit.from_linear(dense(8, 64))
    x = torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))
