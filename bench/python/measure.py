"""Clocks: how long a piece of work takes on a CPU and on a GPU, and how fast the machine copies.

A piece of work is a list of calls that do the same on different memory. A GPU runs the whole list
as one CUDA graph, several times if it is short, so that launches cost what they cost in a captured
training step, and every call finds the caches as cold as the list is long. Rivals take turns, round
by round: clocks and heat that drift meet all of them alike.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], torch.Tensor]

_PAUSE_S = 0.005
_EAGER_CALLS = 32
_GRAPH_NODES = 200
# Starting a graph and recording two events takes some 10 us: half a percent of this.
_LEAST_GRAPH_US = 2000


@dataclasses.dataclass(frozen=True)
class Work:
    """Calls that do the same on different memory."""

    calls: Sequence[Call]
    capturable: bool = True
    """Whether all of its kernels run on torch's current stream; if not, it is timed eagerly."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of one call: median and quartiles over the rounds."""

    median_us: float
    quartiles_us: tuple[float, float]
    rounds: int
    method: str
    """"graph", "eager" (launch overhead included) or "wall"."""


def _timing(samples_us: Sequence[float], method: str) -> Timing:
    low, median, high = (
        statistics.quantiles(samples_us, n=4, method="inclusive")
        if len(samples_us) > 1
        else samples_us * 3
    )
    return Timing(median, (low, high), len(samples_us), method)


def time_on_cpu(works: dict[str, Work], rounds: int, budget_s: float) -> dict[str, Timing]:
    """Time every work in turn: at least 3 rounds, then until `rounds` or the budget is reached."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work.calls[0]()
    deadline = time.perf_counter() + budget_s
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > deadline:
            break
        for name, work in works.items():
            call = work.calls[done % len(work.calls)]
            # The idle threads of the rival before spin for some milliseconds, on the same cores.
            time.sleep(_PAUSE_S)
            begin = time.perf_counter()
            result = call()
            end = time.perf_counter()
            # Returning the memory is not part of the work.
            del result
            samples[name].append((end - begin) * 1e6)
    return {name: _timing(values, "wall") for name, values in samples.items()}


class _Replay:
    """A work as something that can be queued again and again."""

    def __init__(self, work: Work) -> None:
        self._calls = list(work.calls)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: list[torch.Tensor] = []
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in work.calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if work.capturable:
            self._capture()
            self.sample_us()
            repeats = math.ceil(_LEAST_GRAPH_US / (self.sample_us() * len(self._calls)))
            if repeats > 1:
                self._calls *= repeats
                self._capture()

    def _capture(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            # All outputs stay alive, so that each call writes memory of its own.
            self._outputs = [call() for call in self._calls]
        torch.cuda.synchronize()

    def sample_us(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        if self._graph is not None:
            self._graph.replay()
        else:
            for call in self._calls:
                call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / len(self._calls)


def time_on_cuda(works: dict[str, Work], rounds: int, budget_s: float) -> dict[str, Timing]:
    """As `time_on_cpu`, on the current CUDA device; a sample is one replay of a whole list."""
    replays = {name: _Replay(work) for name, work in works.items()}
    samples: dict[str, list[float]] = {name: [] for name in works}
    for replay in replays.values():
        replay.sample_us()
    deadline = time.perf_counter() + budget_s
    for done in range(rounds):
        if done >= 10 and time.perf_counter() > deadline:
            break
        for name, replay in replays.items():
            samples[name].append(replay.sample_us())
    return {
        name: _timing(values, "graph" if works[name].capturable else "eager")
        for name, values in samples.items()
    }


def time_eagerly(works: dict[str, Work], rounds: int, budget_s: float) -> dict[str, Timing]:
    """Time calls as a program makes them on CUDA: wall time a call, the host's work in it.

    A sample goes through all of a work's calls, several times if they are few, and waits once.
    """
    samples: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        _eager_us(work)
    deadline = time.perf_counter() + budget_s
    for done in range(rounds):
        if done >= 5 and time.perf_counter() > deadline:
            break
        for name, work in works.items():
            samples[name].append(_eager_us(work))
    return {name: _timing(values, "wall") for name, values in samples.items()}


def _eager_us(work: Work) -> float:
    passes = -(-_EAGER_CALLS // len(work.calls))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(passes):
        for call in work.calls:
            call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e6 / (passes * len(work.calls))


def time_works(
    works: dict[str, Work], device: torch.device, rounds: int, budget_s: float
) -> dict[str, Timing]:
    """Time rivals against each other on `device`."""
    timer = time_on_cuda if device.type == "cuda" else time_on_cpu
    return timer(works, rounds, budget_s)


def copy_tb_per_s(device: torch.device) -> float:
    """Return the rate of a large copy on `device`, counting bytes read plus bytes written."""
    size = 2**30 if device.type == "cuda" else 2**28
    source, target = (torch.full((size,), i, dtype=torch.uint8, device=device) for i in range(2))
    if device.type == "cuda":
        # Not as a node of a graph, where a copy of this size ran at two thirds of the rate.
        return 2 * size / _median_event_us(lambda: target.copy_(source), rounds=50) / 1e6
    work = Work([lambda: target.copy_(source)])
    timing = time_works({"copy": work}, device, rounds=30, budget_s=5.0)["copy"]
    return 2 * size / timing.median_us / 1e6


def graph_node_us() -> float:
    """Return the least that a kernel costs as a node of a CUDA graph: one element is touched."""
    element = torch.zeros(1, device="cuda")
    work = Work([lambda: element.add_(1)] * _GRAPH_NODES)
    return time_on_cuda({"node": work}, rounds=30, budget_s=5.0)["node"].median_us


def _median_event_us(call: Callable[[], object], rounds: int) -> float:
    for _ in range(5):
        call()
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in events)


class OutputMemory:
    """Where glibc gets the memory of large outputs on a CPU: the same for every rival.

    "fresh": a new mapping each time, whose pages the kernel must fault in, which is what a program
    that allocates a tensor a step sees. "reused": freed memory is kept, so pages are already there.
    A process goes through the modes in this order: kept memory cannot be given back for good.
    """

    MODES = ("fresh", "reused")
    _POOL_BYTES = 2 << 30
    _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4

    def __init__(self) -> None:
        self.available = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")

    def use(self, mode: str) -> None:
        if mode not in self.MODES:
            raise ValueError(f"unknown memory mode {mode!r}; known are {', '.join(self.MODES)}")
        mallopt = ctypes.CDLL(None).mallopt
        if mode == "fresh":
            mallopt(self._M_MMAP_MAX, 65536)
            mallopt(self._M_MMAP_THRESHOLD, 128 << 10)
            mallopt(self._M_TRIM_THRESHOLD, 128 << 10)
        else:
            mallopt(self._M_MMAP_MAX, 0)
            mallopt(self._M_TRIM_THRESHOLD, 2**31 - 1)
            # Touched and freed, it is what later outputs are made of.
            torch.zeros(self._POOL_BYTES, dtype=torch.uint8).fill_(1)
