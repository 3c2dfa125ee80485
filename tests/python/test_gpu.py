"""What only a GPU can show: equality with the CPU, streams, graphs, sizes, memory."""

import copy
import subprocess
import sys

import pytest
import torch

import qlora_native as qn

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same(cuda, cpu):
    for name in ("packed", "absmax", "absmax2", "offset"):
        a, b = getattr(cuda, name), getattr(cpu, name)
        assert (a is None) == (b is None)
        if a is not None:
            # Compared as bytes: NaN equals NaN, and -0 is not 0.
            a, b = a.cpu().reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4", "custom"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_bytes_equal_the_cpus(block_size, quant_type, dtype):
    codebook = [(i / 15) ** 2 * 2 - 1 for i in range(16)] if quant_type == "custom" else None
    for shape in ((1,), (33, 77), (1000, 1031), (256, 4096), (3, 5, 4097)):
        w = torch.randn(shape).to(dtype)
        w.view(-1)[:: max(1, w.numel() // 7)] *= 50
        for double_quant in (False, True):
            cpu = qn.quantize_4bit(w, quant_type, block_size, double_quant, codebook)
            cuda = qn.quantize_4bit(w.cuda(), quant_type, block_size, double_quant, codebook)
            assert_same(cuda, cpu)
            for out in DTYPES:
                assert torch.equal(cuda.dequantize(out).cpu(), cpu.dequantize(out))


@pytest.mark.parametrize("double_quant", [False, True])
def test_hostile_values_equal_the_cpus(double_quant):
    w = torch.randn(40, 6400)
    w[3, 100:200] = 0
    w[5] = 0
    w[7, 70] = float("nan")
    w[8, 71] = float("inf")
    w[20, 0] = -float("inf")
    w[21, :64] = 1e-42
    w[22, :64] = 3e38
    w[23, :128] = -0.0
    for quant_type in ("nf4", "fp4", "int4"):
        cpu = qn.quantize_4bit(w, quant_type, double_quant=double_quant)
        cuda = qn.quantize_4bit(w.cuda(), quant_type, double_quant=double_quant)
        assert_same(cuda, cpu)
        torch.testing.assert_close(
            cuda.dequantize().cpu(), cpu.dequantize(), rtol=0, atol=0, equal_nan=True
        )


def test_runs_on_the_current_stream():
    """Work queued on a busy side stream must wait for its producer there, and only there."""
    q = qn.quantize_4bit(torch.randn(1024, 1024, device="cuda"))
    dense = q.dequantize()
    side = torch.cuda.Stream()
    for m in (1, 64, 1, 64):  # the first round loads kernels, which may wait for the device
        x = torch.zeros(m, 1024, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(500_000_000)
            x.fill_(1.0)
            y = qn.linear_4bit(x, q)
            w = qn.dequantize_4bit(qn.quantize_4bit(dense * x[0, 0]))
            waited = side.query()
        side.synchronize()
        torch.testing.assert_close(y, dense.sum(1).expand(m, -1), rtol=1e-3, atol=1e-2)
        assert torch.equal(w, qn.dequantize_4bit(qn.quantize_4bit(dense)))
    assert not waited, "a call waited for the device"


@pytest.mark.parametrize(
    ("m", "k"), [(1, 768), (4, 768), (4, 8320), (12, 8320), (64, 768), (64, 8320), (600, 768)]
)
def test_graph_capture_and_replay(m, k):
    """Quantize, forward and backward replay on new data, also where thread blocks share sums."""
    w = torch.randn(512, k, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)

    def step():
        q = qn.quantize_4bit(w)
        y = qn.linear_4bit(x, q)
        return y, torch.autograd.grad(y, x, dy)[0], q.dequantize()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):
        with torch.no_grad():
            w.normal_()
            x.normal_()
            dy.normal_()
        graph.replay()
        for a, e in zip(captured, step(), strict=True):
            assert torch.equal(a, e)


def test_compiled_with_cuda_graphs():
    torch._dynamo.reset()
    q = qn.quantize_4bit(torch.randn(256, 512, device="cuda"))
    f = torch.compile(
        lambda x: torch.nn.functional.silu(qn.linear_4bit(x, q)), mode="reduce-overhead"
    )
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(3, 512, device="cuda")
            expected = torch.nn.functional.silu(qn.linear_4bit(x, q))
            torch.testing.assert_close(f(x), expected, rtol=1e-5, atol=1e-5)


def test_more_than_2_31_elements():
    n = 2**31 + 2**20 + 64
    w = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_()
    q = qn.quantize_4bit(w, double_quant=False)
    tail = slice(n - 64 * 1000, None)
    expected = qn.quantize_4bit(w[tail].cpu(), double_quant=False)
    assert torch.equal(q.packed[-expected.packed.numel() :].cpu(), expected.packed)
    assert torch.equal(q.absmax[-1000:].cpu(), expected.absmax)
    d = q.dequantize()
    assert torch.equal(d[tail].cpu(), expected.dequantize())
    del d, q
    q = qn.quantize_4bit(w)  # double-quantized, and as a matrix
    k = 65536
    rows = n // k
    del w
    wide = qn.QuantizedTensor(
        q.packed[: rows * k // 2],
        q.absmax[: rows * k // 64],
        q.absmax2[: -(-rows * k // 64 // 256)],
        q.offset,
        torch.Size((rows, k)),
        torch.bfloat16,
    )
    x = torch.randn(2, k, device="cuda", dtype=torch.bfloat16)
    y = qn.linear_4bit(x, wide)
    last = wide.dequantize()[-256:]
    torch.testing.assert_close(y[:, -256:], x @ last.t(), rtol=2e-2, atol=2.0)


OUT_OF_MEMORY = """
import torch
import qlora_native as qn

q = qn.quantize_4bit(torch.randn(16384, 16384, device="cuda", dtype=torch.bfloat16))
x = torch.randn(2048, 16384, device="cuda", dtype=torch.bfloat16)
expected = qn.linear_4bit(x, q)
torch.cuda.empty_cache()
allowed = torch.cuda.memory_reserved() + 300 * 2**20
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(allowed / total)
try:
    qn.linear_4bit(x, q)
except torch.cuda.OutOfMemoryError as error:
    assert "Tried to allocate 512.00 MiB" in str(error), error
else:
    raise SystemExit("no error")
torch.cuda.set_per_process_memory_fraction(1.0)
assert torch.equal(qn.linear_4bit(x, q), expected)
"""


def test_out_of_memory_is_an_exception_and_leaves_the_library_usable():
    """A product that decodes its weight to a dense one, with no room for it.

    In a process of its own: torch's allocator gives memory of earlier tests' graphs back in need.
    """
    result = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_devices_are_listed():
    (info,) = [d for d in qn.list_devices() if d.device == "cuda:0"]
    assert info.name == torch.cuda.get_device_name(0)
    assert info.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert qn.cuda_unavailable_reason() == ""
    assert any(k.usable for k in qn.kernels.list("matmul_4bit") if k.device == "cuda")


def test_doctor_sees_the_gpu():
    for module in ("datasets", "typer"):
        pytest.importorskip(module)
    from qlora_native.cli.doctor import examine

    findings = examine()
    assert findings["problems"] == []
    assert findings["cuda"]["library_sees_gpu"] and findings["cuda"]["usable"]


def test_a_layer_moves_and_trains():
    linear = torch.nn.Linear(256, 128)
    cpu = qn.nn.Linear4bit.from_linear(linear)
    cuda = copy.deepcopy(cpu).cuda()
    assert torch.equal(cuda.weight.cpu(), cpu.weight)
    x = torch.randn(5, 256)
    torch.testing.assert_close(cuda(x.cuda()).cpu(), cpu(x), rtol=1e-5, atol=1e-5)
