"""Low-rank products of groups of rows, in every way of computing them, against fp64."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from _graphs import captured
from _hf import tiny
from qlora_native import _grouped_lora_ops
from qlora_native._dense_groups import GroupedGemm, HostGroups, TiledGroups
from qlora_native._grouped_lora import grouped_lora
from qlora_native.nn import quantize_experts
from qlora_native.nn.expert_conversion import is_experts
from qlora_native.nn.experts import ExpertAdapter

SCALING = 1.5
WAYS = {
    "host": lambda x, ends, rank: HostGroups(ends, len(x)),
    "tiles": lambda x, ends, rank: TiledGroups(ends, len(x), rank),
    "gemm": lambda x, ends, rank: GroupedGemm(ends),
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Has every product computed in one of the ways."""
    monkeypatch.setattr(_grouped_lora_ops, "groups_of", WAYS[request.param])
    return request.param


def problem(sizes, shape, device="cpu", dtype=torch.float32):
    """(x, ends, a, b, dy) for groups of these sizes and shape (in, out, r)."""
    cols, out, rank = shape
    ends = torch.tensor(sizes).cumsum(0)
    x, dy = torch.randn(sum(sizes), cols), torch.randn(sum(sizes), out)
    a, b = torch.randn(len(sizes), rank, cols), torch.randn(len(sizes), out, rank)
    x, a, b = (t.to(device, dtype).requires_grad_() for t in (x, a, b))
    return x, ends.to(device), a, b, dy.to(device, dtype)


def reference(x, ends, a, b, dy):
    """y and the gradients of x, A and B in fp64, a group at a time."""
    x, a, b = (t.detach().cpu().double().requires_grad_() for t in (x, a, b))
    start, rows = 0, []
    for e, end in enumerate(ends.tolist()):
        rows.append(SCALING * x[start:end] @ a[e].T @ b[e].T)
        start = end
    y = torch.cat(rows)
    return y.detach(), *torch.autograd.grad(y, (x, a, b), dy.cpu().double())


def assert_close(results, expected, dtype):
    tolerance = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    for got, wanted in zip(results, expected, strict=True):
        assert got.shape == wanted.shape
        error = (got.detach().cpu().double() - wanted).norm()
        assert error <= tolerance * wanted.norm(), (error, wanted.norm())


CASES = [
    ((3, 0, 7, 1), (16, 24, 8)),
    ((0, 0, 23, 0), (16, 24, 8)),  # all on one
    ((9,), (32, 8, 4)),
    ((1, 1, 1), (20, 37, 3)),  # no rank and no features of 16 bytes
    ((0, 40, 2, 100, 0), (50, 18, 5)),
    ((70, 130), (64, 96, 1)),
    ((0, 1, 0), (8, 8, 40)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("sizes", "shape"), CASES, ids=str)
def test_every_way_is_that_of_fp64(way, sizes, shape, dtype):
    x, ends, a, b, dy = problem(sizes, shape, dtype=dtype)
    ends = ends.int() if dtype == torch.float16 else ends
    y = grouped_lora(x, ends, a, b, SCALING)
    results = (y, *torch.autograd.grad(y, (x, a, b), dy))
    assert all(result.dtype == dtype and result.is_contiguous() for result in results)
    assert_close(results, reference(x, ends, a, b, dy), dtype)
    for gradient in results[2:]:
        empty = [e for e, size in enumerate(sizes) if not size]
        assert not gradient[empty].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("sizes", "shape"), CASES, ids=str)
def test_every_device_is_that_of_fp64_with_the_same_bits_again(
    device, sizes, shape, dtype, index_dtype
):
    x, ends, a, b, dy = problem(sizes, shape, device, dtype)
    runs = []
    for _ in range(2):
        y = grouped_lora(x, ends.to(index_dtype), a, b, SCALING)
        runs.append((y, *torch.autograd.grad(y, (x, a, b), dy)))
    assert_close(runs[0], reference(x, ends, a, b, dy), dtype)
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_fp32_factors_beside_16_bits_and_strided_arguments(device, way):
    x, ends, a, b, dy = problem((5, 0, 30), (16, 24, 8), device, torch.bfloat16)
    masters = [t.detach().float().requires_grad_() for t in (a, b)]
    # As PEFT has B: the ranks interleaved.
    interleaved = masters[1].detach().permute(1, 2, 0).contiguous().requires_grad_()
    wide = torch.cat([x, x], dim=1).detach()[:, 1:17]
    arguments = (wide.requires_grad_(), masters[0], interleaved)
    y = grouped_lora(wide, ends, masters[0], interleaved.permute(2, 0, 1), SCALING)
    dx, da, db = torch.autograd.grad(y, arguments, dy.t().contiguous().t())
    assert (y.dtype, dx.dtype, da.dtype, db.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
    expected = reference(wide, ends, a, b, dy)
    assert_close((y, dx, da, db.permute(2, 0, 1)), expected, torch.bfloat16)


def test_one_row_of_any_stride(device, way):
    x, ends, a, b, dy = problem((0, 1), (16, 24, 8), device, torch.bfloat16)
    expected = reference(x, ends, a, b, torch.ones_like(dy))
    row = torch.cat([x, x], dim=1).detach()[:, 3:19].as_strided((1, 16), (5, 1), 16)
    row.requires_grad_()
    y = grouped_lora(row, ends, a, b, SCALING)
    gradients = torch.autograd.grad(y, (row, a, b), y.new_ones(()).expand(1, 24))
    assert_close((y, *gradients), expected, torch.bfloat16)


def test_no_rows_and_no_groups(device, way):
    x, ends, a, b, dy = problem((0, 0), (16, 24, 8), device)
    y = grouped_lora(x, ends, a, b, SCALING)
    assert y.shape == (0, 24)
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
    assert dx.shape == x.shape
    assert not da.any()
    assert not db.any()
    assert grouped_lora(x, ends[:0], a[:0], b[:0], SCALING).shape == (0, 24)


def test_what_is_not_finite_stays_in_its_group(way):
    x, ends, a, b, dy = problem((5, 6, 7), (16, 24, 8))
    expected = grouped_lora(x, ends, a, b, SCALING)
    expected_gradients = torch.autograd.grad(expected, (a, b), dy)
    with torch.no_grad():
        x[5:11] = torch.inf
    y = grouped_lora(x, ends, a, b, SCALING)
    gradients = torch.autograd.grad(y, (a, b), dy)
    assert not y[5:11].isfinite().any()
    torch.testing.assert_close(y[11:], expected[11:])
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_gradients_of_some_and_what_is_kept_for_them(wanted):
    x, ends, a, b, dy = problem((5, 6, 7), (16, 24, 8))
    expected = reference(x, ends, a, b, dy)[1:]
    arguments = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, a, b))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = grouped_lora(arguments[0], ends, *arguments[1:], SCALING)
    gradients = torch.autograd.grad(y, [arguments[i] for i in wanted], dy)
    assert_close(gradients, [expected[i] for i in wanted], torch.float32)
    assert any(t.shape == x.shape for t in kept) == (1 in wanted)
    assert any(t.shape == (18, 8) for t in kept) == (2 in wanted)


def test_compiled_and_checkpointed_it_is_the_same(device):
    x, ends, a, b, _ = problem((5, 0, 7), (16, 24, 8), device)

    def layer(x):
        return grouped_lora(x.tanh(), ends, a, b, SCALING).square()

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    results = []
    for one in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), checkpointed):
        y = one(x)
        results.append((y, *torch.autograd.grad(y.sum(), (x, a, b))))
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted)


def test_operator_checks():
    x, ends, a, b, dy = problem((5, 0, 7), (16, 24, 8))
    operators = torch.ops.qlora_native
    torch.library.opcheck(operators.grouped_lora.default, (x, ends, a, b, SCALING))
    t = torch.randn(12, 8)
    plain = [t.detach() for t in (x, a, b)]
    arguments = (dy, plain[0], t, ends, *plain[1:], SCALING)
    for wanted in ((True, True, True), (False, True, False), (True, False, True)):
        torch.library.opcheck(operators.grouped_lora_backward.default, (*arguments, *wanted))


def test_wrong_arguments_are_named():
    x, ends, a, b, _ = problem((5, 0, 7), (16, 24, 8))
    with pytest.raises(ValueError, match=r"A has shape \(3, 8, 16\) and B \(3, 24, 7\), expected"):
        grouped_lora(x, ends, a, b[..., :7], SCALING)
    with pytest.raises(ValueError, match=r"x has shape \(12, 15\), but the weights are \(3, 24"):
        grouped_lora(x[:, :15], ends, a, b, SCALING)
    with pytest.raises(ValueError, match=r"group_ends is \(2,\) torch.int64, expected \(3,\)"):
        grouped_lora(x, ends[:2], a, b, SCALING)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        grouped_lora(x.double(), ends, a, b, SCALING)
    with pytest.raises(TypeError, match=r"B is torch\.int64, expected a floating dtype"):
        grouped_lora(x, ends, a, b.long(), SCALING)
    for bad in ([3, 2, 12], [-1, 3, 12], [5, 13, 12]):
        with pytest.raises(ValueError, match=r"group \d ends at row -?\d+, after \d+, of 12 rows"):
            grouped_lora(x, torch.tensor(bad), a, b, SCALING)
    with pytest.raises(ValueError, match="x has 12 rows, but there is no group"):
        grouped_lora(x, ends[:0], a[:0], b[:0], SCALING)
    with pytest.raises(ValueError, match="the last group ends at row 11 of 12 rows"):
        grouped_lora(x, torch.tensor([5, 5, 11]), a, b, SCALING)
    with pytest.raises(ValueError, match=r"t is None, expected \(12, 8\) torch.float32"):
        torch.ops.qlora_native.grouped_lora_backward(
            x.detach()[:, :1].expand(12, 24), None, None, ends, a, b, SCALING, False, False, True
        )


@pytest.mark.parametrize(("groups", "rows", "rank"), [(128, 32768, 16), (8, 8, 64), (3, 1, 1)])
def test_tiles_suffice_for_every_division(groups, rows, rank):
    """And no more memory is taken for them than a few times that of what is multiplied."""
    worst = torch.ones(groups, dtype=torch.long) if groups <= rows else torch.arange(groups) < rows
    sizes = [worst.long(), torch.zeros(groups, dtype=torch.long)]
    sizes[0][-1] += rows - int(sizes[0].sum())
    sizes[1][groups // 2] = rows
    for size in sizes:
        tiles = TiledGroups(size.cumsum(0), rows, rank)
        height = tiles.row.shape[1]
        used = (size + height - 1) // height
        assert int(used.sum()) <= len(tiles.row) <= int(used.sum()) + rows // height + groups
        assert torch.equal(tiles.row.flatten()[tiles.place], torch.arange(rows))
        assert int((~tiles.is_padding).sum()) == rows


class NoWaiting(TorchDispatchMode):
    """Raises at what makes the host wait for a GPU, but for copies, which look alike on a CPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "repeat_interleave")
    KERNELS = {  # noqa: RUF012
        "grouped_lora": _grouped_lora_ops.forward,
        "grouped_lora_backward": _grouped_lora_ops.backward,
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        by_mask = "index" in name and any(
            isinstance(part, list) and any(t is not None and t.dtype == torch.bool for t in part)
            for part in args
        )
        if by_mask or name.partition(".")[0] in self.WAITS:
            raise AssertionError(f"{func} waits for the device")
        if namespace == "qlora_native" and name in self.KERNELS:
            with self:
                return self.KERNELS[name](*args)
        return func(*args, **(kwargs or {}))


def base_product(x, ends, bias, packed, *parts):
    return x.new_zeros(len(x), packed.shape[1])


def base_product_dx(dy, ends, packed, *parts):
    return dy.new_zeros(len(dy), 2 * packed.shape[2])


def adapted_layer(device="cpu", dtype=torch.float32):
    """(layer of experts, arguments of its forward, tensors with gradients)."""
    dense = next(m for m in tiny("gpt_oss").modules() if is_experts(m)).to(dtype)
    layer = quantize_experts(copy.deepcopy(dense), device=device)
    trained = []
    for name, stack in layer.formats.items():
        experts, out, cols = stack.shape
        a, b = torch.randn(experts, 5, cols) / 8, torch.randn(experts, out, 5) / 8
        a, b = (t.to(device, dtype).requires_grad_() for t in (a, b))
        dropout = torch.nn.Dropout(0.25)
        layer.adapters[name] = [ExpertAdapter(a, b, SCALING, dropout)]
        trained += [a, b]
    x = torch.randn(9, 32).to(device, dtype).requires_grad_()
    index = torch.randint(0, 4, (9, 2)).to(device)
    return layer, (x, index, torch.rand(9, 2).to(device, dtype)), [x, *trained]


@contextmanager
def no_waiting(monkeypatch):
    def refused(self):
        raise AssertionError("tolist waits for the device")

    with NoWaiting():
        # It reads memory without an operation.
        monkeypatch.setattr(torch.Tensor, "tolist", refused)
        yield


@pytest.mark.parametrize("way", ["tiles", "gemm"], indirect=True)
def test_nothing_waits_for_the_groups(way, monkeypatch):
    # The base product's own test is that of its launch; on a CPU it reads the groups.
    monkeypatch.setitem(NoWaiting.KERNELS, "grouped_linear_4bit", base_product)
    monkeypatch.setitem(NoWaiting.KERNELS, "grouped_linear_4bit_dx", base_product_dx)
    layer, arguments, trained = adapted_layer()
    with no_waiting(monkeypatch):
        torch.autograd.grad(layer(*arguments).sum(), trained)


def test_waiting_would_be_noticed(monkeypatch):
    monkeypatch.setattr(_grouped_lora_ops, "groups_of", WAYS["host"])
    x, ends, a, b, _ = problem((5, 0, 7), (16, 24, 8))
    with no_waiting(monkeypatch):
        with pytest.raises(AssertionError, match="tolist waits"):
            grouped_lora(x, ends, a, b, SCALING)
        with pytest.raises(AssertionError, match=r"aten\._local_scalar_dense.* waits"):
            ends[0].item()
        with pytest.raises(AssertionError, match=r"aten\.index.* waits"):
            x[x > 0]


def test_a_layer_with_adapters_compiles_in_one_graph(device):
    layer, arguments, trained = adapted_layer(device)
    layer.adapters = {n: [a._replace(dropout=torch.nn.Identity()) for a in adapters]
                      for n, adapters in layer.adapters.items()}  # fmt: skip
    results = []
    for one in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = one(*arguments)
        results.append((y, *torch.autograd.grad(y.square().sum(), trained)))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("how", ["autocast", "compute_dtype"])
def test_products_run_in_the_dtype_of_the_base_product(how):
    layer, arguments, trained = adapted_layer()
    layer.eval()
    for adapters in layer.adapters.values():
        adapters[0].dropout.eval()
    exact = layer(*arguments)
    expected = torch.autograd.grad(exact.square().sum(), trained)
    seen = []
    if how == "compute_dtype":
        layer.compute_dtype = torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        for adapters in layer.adapters.values():
            adapters[0].dropout.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
        y = layer(*arguments)
    gradients = torch.autograd.grad(y.square().sum(), trained)
    assert torch.bfloat16 in seen
    assert y.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert not torch.equal(y, exact)
    for got, wanted in zip((y, *gradients), (exact, *expected), strict=True):
        assert (got - wanted).norm() < 0.03 * wanted.norm()


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_host_does_not_wait_for_a_gpu(dtype):
    layer, arguments, trained = adapted_layer("cuda", dtype)
    torch.autograd.grad(layer(*arguments).sum(), trained)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(layer(*arguments).sum(), trained)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_holds_a_step_and_replays_it_with_other_groups(dtype):
    x, ends, a, b, dy = problem((10, 10, 10, 10), (64, 96, 5), "cuda", dtype)

    def step():
        y = grouped_lora(x, ends, a, b, SCALING)
        return (y, *torch.autograd.grad(y, (x, a, b), dy))

    graph, results = captured(step)
    for groups in ([40, 40, 40, 40], [0, 1, 2, 40], [0, 0, 33, 40]):
        ends.copy_(torch.tensor(groups))
        graph.replay()
        assert_close(results, reference(x, ends, a, b, dy), dtype)
