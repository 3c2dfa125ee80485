"""Training steps as one CUDA graph, for batches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

EAGER_STEPS = 3
"""Before the recording: optimizers make their states, libraries their workspaces and choices."""


class GraphedStep:
    """A step that is recorded once and replayed: the host launches one graph, not its kernels.

    The first `eager_steps` calls run the step as it is; the next one records and replays it, later
    ones replay it. Every call is a step. What the step reads must stay where it is: its batch is
    copied into tensors that do, parameters are changed in place, and a learning rate that changes
    has to be a tensor on the device.

    A whole step (forward, backward, optimizer, `zero_grad(set_to_none=True)`) needs nothing else. A
    step that leaves gradients to its caller, who may drop them between calls, names `parameters`:
    they then keep one gradient tensor each, zeroed when the caller had dropped it.

    The step must not wait for the device, and a paged optimizer's cannot be recorded. Gradient
    checkpointing needs `preserve_rng_state=False`.

    Args:
        step: takes the batch, returns the loss.
        parameters: those whose gradients the step leaves in `.grad`.

    Raises:
        ValueError: there is no GPU, or (in a call) a batch is of another shape than the first.
    """

    def __init__(
        self,
        step: Callable[[dict[str, Tensor]], Tensor],
        parameters: Iterable[torch.nn.Parameter] = (),
        *,
        eager_steps: int = EAGER_STEPS,
    ) -> None:
        if not torch.cuda.is_available():
            raise ValueError("a CUDA graph needs a GPU, and torch sees none")
        self._step = step
        self._parameters = list(parameters)
        self._gradients: list[Tensor] = []
        self._batch: dict[str, Tensor] | None = None
        self._eager_left = eager_steps
        self._graph: Any = None
        self._loss: Tensor | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Takes a step; the loss is on the device, and the caller's own."""
        inputs = self._copied(batch)
        self._attach_gradients()
        if self._eager_left > 0:
            self._eager_left -= 1
            return _beside(self._step, inputs)
        if self._graph is None:
            # Recording runs nothing: the step that it is called for is the first replay.
            self._graph, self._loss = _record(self._step, inputs)
        self._graph.replay()
        return self._loss.clone()

    def _copied(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._batch is None:
            self._batch = {n: value.to(_device(), copy=True) for n, value in batch.items()}
            return self._batch
        check_same_shapes(batch, self._batch)
        for name, value in batch.items():
            self._batch[name].copy_(value, non_blocking=True)
        return self._batch

    def _attach_gradients(self) -> None:
        if not self._parameters:
            return
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self._parameters]
        dropped = []
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is None:
                dropped.append(gradient)
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        if dropped:
            torch._foreach_zero_(dropped)


def check_same_shapes(batch: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless a batch has the names and shapes of the first one."""
    shapes, of_first = ({n: tuple(t.shape) for n, t in some.items()} for some in (batch, first))
    if shapes != of_first:
        raise ValueError(
            f"a CUDA graph has one shape: this batch is {shapes}, the first {of_first}"
        )


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _beside(step: Callable[[dict[str, Tensor]], Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Runs a step on another stream than the default one, which a recording asks for."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        loss = step(batch).detach().clone()
    current.wait_stream(side)
    loss.record_stream(current)
    return loss


def _record(
    step: Callable[[dict[str, Tensor]], Tensor], batch: dict[str, Tensor]
) -> tuple[Any, Tensor]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(batch).detach()
    return graph, loss
