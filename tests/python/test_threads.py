"""The core computes on torch's threads, as many as torch uses, and survives a fork."""

import os
import threading

import pytest
import torch

import qlora_native as qn
from qlora_native import _C, _threads


def test_the_runtime_is_found_in_the_maps():
    maps = (
        "7f1 r-xp 0 08:01 1 /usr/lib/python3/site-packages/torch/lib/libtorch_cpu.so\n"
        "7f2 r-xp 0 08:01 2 /opt/my env/torch/lib/libgomp-1a2b.so.1\n"
        "7f3 r--p 0 08:01 2 /opt/my env/torch/lib/libgomp-1a2b.so.1\n"
        "7f4 rw-p 0 00:00 0 \n"
        "7f5 r-xp 0 08:01 3 /usr/lib/libiomp5.so\n"
    )
    assert _threads.loaded_openmp_runtimes(maps) == [
        "/opt/my env/torch/lib/libgomp-1a2b.so.1",
        "/usr/lib/libiomp5.so",
    ]


def test_torchs_runtime_is_shared_and_can_be_left():
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this torch has no OpenMP")
    runtime = _threads.share_torch_threads()
    assert runtime is not None and "omp" in runtime
    w = torch.randn(512, 512)
    shared = qn.quantize_4bit(w)
    try:
        _C.use_own_threads()
        own = qn.quantize_4bit(w)
    finally:
        _threads.share_torch_threads()
    assert torch.equal(shared.packed, own.packed) and torch.equal(shared.absmax, own.absmax)


def test_no_runtime_no_sharing():
    assert not _C.use_openmp("libno_such_library.so")
    assert not _C.use_openmp(_C.__file__)  # loaded, but no OpenMP runtime


def test_flushing_subnormals_does_not_change_the_bytes():
    w = torch.full((64 * 256,), 3e-39)
    w[::64] = 4e-39
    expected = qn.quantize_4bit(w, double_quant=False)
    try:
        torch.set_flush_denormal(True)
        flushed = qn.quantize_4bit(w, double_quant=False)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(flushed.packed, expected.packed)
    assert torch.equal(flushed.absmax.view(torch.int32), expected.absmax.view(torch.int32))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes():
    w = torch.randn(1024, 512)
    expected = qn.quantize_4bit(w).packed.numpy().tobytes()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # Compared without torch, whose own operations hang in a forked child of a threaded process.
        packed = qn.quantize_4bit(w).packed.numpy().tobytes()
        os.write(writer, b"1" if packed == expected else b"0")
        os._exit(0)
    os.close(writer)
    watchdog = threading.Timer(60, os.kill, (child, 9))
    watchdog.start()
    answer = os.read(reader, 1)
    watchdog.cancel()
    os.waitpid(child, 0)
    os.close(reader)
    assert answer == b"1"


def test_concurrent_callers():
    w = torch.randn(300, 640)
    expected = qn.quantize_4bit(w)
    x = torch.randn(4, 640)
    y = qn.linear_4bit(x, expected)
    wrong = []

    def work():
        for _ in range(20):
            q = qn.quantize_4bit(w)
            if not torch.equal(q.packed, expected.packed):
                wrong.append("quantize")
            if not torch.equal(qn.linear_4bit(x, q), y):
                wrong.append("linear")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
