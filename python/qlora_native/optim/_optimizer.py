"""What the optimizers share: groups, state, checkpoints, and the step over all parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from qlora_native import _C, _weight, memory
from qlora_native.optim import _state
from qlora_native.optim._overrides import Overrides
from qlora_native.optim._paging import GivenPool, PagedStates

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)

_FOREIGN_OPTIONS = frozenset(
    # bitsandbytes', then torch's
    ("alpha", "t_alpha", "t_beta3", "amsgrad", "foreach", "capturable", "differentiable", "fused",
     "decoupled_weight_decay")
)  # fmt: skip
"""What groups of other optimizers' state dicts hold, and ours do not."""


def _empty_bytes(size_bytes: int, device_code: int) -> torch.Tensor:
    return torch.empty(size_bytes, dtype=torch.uint8, device=_device_of(device_code))


def _device_of(code: int) -> torch.device:
    return torch.device("cpu") if code < 0 else torch.device("cuda", code)


def _make_stepper() -> _C.OptimizerStepper:
    return _C.OptimizerStepper(
        exchange_api=getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
        dtypes=_DTYPES,
        current_stream=lambda index: torch._C._cuda_getCurrentRawStream(index),
        empty_bytes=_empty_bytes,
    )


class _Loaded:
    """Hides a tensor from torch's `load_state_dict`, which casts to the parameter's dtype."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class NativeOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: see `AdamW` for the arguments."""

    algorithm: str
    moments: tuple[str, ...]

    # torch.amp.GradScaler then leaves the gradients scaled, and lends `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        bits: int,
        min_8bit_size: int,
        master_weights: bool,
        stochastic_rounding: bool,
        seed: int,
        max_norm: float,
        skip_nonfinite: bool,
        paged: bool | memory.PagedPool,
    ) -> None:
        if bits not in (8, 32):
            raise ValueError(f"bits is {bits}; states have 8 or 32")
        if max_norm < 0:
            raise ValueError(f"max_norm is {max_norm}; 0 is no clipping, and less makes no sense")
        if master_weights and stochastic_rounding:
            raise ValueError("a parameter with a master copy is not rounded at random: choose one")
        self._options = {
            "bits": bits,
            "min_8bit_size": min_8bit_size,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "max_norm": float(max_norm),
            "skip_nonfinite": skip_nonfinite,
            "paged": bool(paged),
        }
        self._overrides = Overrides()
        self._given_pool = GivenPool(paged) if isinstance(paged, memory.PagedPool) else None
        self._set_up()
        super().__init__(params, defaults)

    def _set_up(self) -> None:
        self._stepper = _make_stepper()
        self._paging = PagedStates(self._given_pool) if self._options["paged"] else None
        self._allocations: dict[int, list[tuple[int, int]]] = {}
        self.grad_norm: torch.Tensor | None = None
        """The L2 norm of all gradients as the last step found them (one element, on their device);
        None unless the optimizer clips or skips steps that are not finite."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, with its hyperparameters checked."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: Mapping[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, torch.Tensor):
            if lr.numel() != 1:
                raise ValueError(f"lr is a tensor of {lr.numel()} elements, expected one")
        elif not lr >= 0:
            raise ValueError(f"lr is {lr}, expected 0 or more")
        for i, beta in enumerate(group["betas"]):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}] is {beta}, expected at least 0 and less than 1")
        for name in ("eps", "weight_decay"):
            if not group.get(name, 0) >= 0:
                raise ValueError(f"{name} is {group[name]}, expected 0 or more")

    def register_override(
        self, module_or_name: torch.nn.Module | torch.nn.Parameter | str, bits: int = 32
    ) -> None:
        """Keep the state of some parameters in `bits` bits, whatever the optimizer's own are.

        Args:
            module_or_name: a module or parameter that the optimizer holds; or the name of a
                parameter, or of the module that it is in, for an optimizer that was given
                ``model.named_parameters()``.
            bits: 8 or 32. With 8, `min_8bit_size` still applies.

        Raises:
            ValueError: nothing is called so, or it is not in this optimizer.
            RuntimeError: a state exists already.
        """
        if bits not in (8, 32):
            raise ValueError(f"bits is {bits}; states have 8 or 32")
        for place in self._overrides.find(self.param_groups, module_or_name):
            if self.state.get(self.param_groups[place[0]]["params"][place[1]]):
                raise RuntimeError(
                    "the state exists already: register overrides before the first step"
                )
            self._overrides.bits[place] = bits

    def _bits_of(self, place: tuple[int, int], param: torch.Tensor) -> int:
        bits = self._overrides.bits.get(place, self._options["bits"])
        return 32 if param.numel() < self._options["min_8bit_size"] else bits

    def _init_states(self, places: Iterable[tuple[int, int]]) -> None:
        params, entries = [], []
        for place in places:
            param = self.param_groups[place[0]]["params"][place[1]]
            if param.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the optimizer has no state yet, and a graph that makes it would reset it in "
                    "every replay: take a step before the capture"
                )
            bits = self._bits_of(place, param)
            master = self._options["master_weights"]
            params.append(param)
            entries.append(_state.fresh_entries(param, self.moments, bits, master))
        for param, state in zip(params, self._states_of(params, entries), strict=True):
            self.state[param] = state

    def state_bytes(self) -> int:
        """Return the bytes of all parameters' states, which need not exist yet; of own shards."""
        size = 0
        for i, group in enumerate(self.param_groups):
            for j, param in enumerate(group["params"]):
                bits, master = self._bits_of((i, j), param), self._options["master_weights"]
                entries = _state.fresh_entries(param, self.moments, bits, master)
                size += sum(entry.size_bytes for entry in entries.values())
        return size

    @property
    def is_paged(self) -> bool:
        """Whether the state is in paged memory."""
        return self._options["paged"]

    def _states_of(
        self, params: Sequence[torch.Tensor], entries: Sequence[_state.Entries]
    ) -> list[_state.State]:
        """Return states with these contents where this optimizer's belong."""
        self._allocations.clear()
        if self._paging is not None:
            return self._paging.place(params, entries)
        return [
            {name: e.make(_state.local_part(param).device) for name, e in own.items()}
            for param, own in zip(params, entries, strict=True)
        ]

    def _paging_of(self, code: int) -> tuple[Any, list[tuple[int, int]], int]:
        """The pool of a device, where states are in it, and how much of them to bring at a time."""
        device = _device_of(code)
        if self._paging is None or not self._paging.is_moved(device):
            return None, [], 0
        if code not in self._allocations:
            self._allocations[code] = self._paging.allocations(self.state.values(), device)
        pool = self._paging.pool(device)
        return pool.core, self._allocations[code], self._paging.part_bytes(device)

    def _read(self) -> list[tuple[int, int]]:
        on_host = self._paging is not None and self._paging.keeps_state_on_host()
        return self._stepper.read(self.param_groups, self.state, allows_host_state=on_host)

    def _group_values(self, device: torch.device) -> list[tuple[Any, ...]]:
        """The groups' hyperparameters as the core takes them; an lr on the device stays there."""
        values = []
        for group in self.param_groups:
            lr, lr_on_device = group["lr"], None
            if isinstance(lr, torch.Tensor):
                if lr.is_cuda and lr.device == device:
                    lr, lr_on_device = 0.0, lr.detach().to(torch.float32)
                else:
                    lr = lr.item()
            beta1, beta2 = group["betas"]
            values.append(
                (lr, lr_on_device, beta1, beta2, group.get("eps", 0.0), group["weight_decay"],
                 group["maximize"])
            )  # fmt: skip
        return values

    def _needs_norm(self) -> bool:
        return self._options["max_norm"] > 0 or self._options["skip_nonfinite"]

    def _require_whole_gradients(self) -> None:
        # The core sees a rank's part alone: ranks would clip by different norms, or skip alone.
        params = (param for group in self.param_groups for param in group["params"])
        if any(_state.is_split(param) for param in params):
            raise ValueError(
                "max_norm and skip_nonfinite see one rank's gradients, and there are parameters "
                "that are split over several (DTensors): leave both off, and call "
                "torch.nn.utils.clip_grad_norm_, whose norm is of all ranks, before the step"
            )

    def _scalar_on(self, name: str, device: torch.device) -> torch.Tensor | None:
        """What GradScaler lent under a name."""
        value = getattr(self, name, None)
        return None if value is None else value.to(device, torch.float32, non_blocking=True)

    def _step_on(self, code: int) -> None:
        device = _device_of(code)
        _weight.stream_and_threads(device)
        if self._needs_norm():
            if self.grad_norm is None or self.grad_norm.device != device:
                self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
            self._stepper.gradient_norm(code, self.grad_norm)
        pool, allocations, part_bytes = self._paging_of(code)
        self._stepper.step(
            code,
            algorithm=self.algorithm,
            groups=self._group_values(device),
            grad_scale=self._scalar_on("grad_scale", device),
            found_inf=self._scalar_on("found_inf", device),
            grad_norm=self.grad_norm if self._needs_norm() else None,
            max_norm=self._options["max_norm"],
            skip_nonfinite=self._options["skip_nonfinite"],
            stochastic_rounding=self._options["stochastic_rounding"],
            seed=self._options["seed"],
            pool=pool,
            allocations=allocations,
            part_bytes=part_bytes,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step for every parameter that has a gradient; return what `closure` does.

        Nothing waits for a GPU. On it, the work is queued on the current stream.

        Raises:
            ValueError: a parameter, its gradient or its state is of a kind that is not supported (a
                sparse gradient, a parameter that is not contiguous, one that is split over ranks
                with `max_norm` or `skip_nonfinite`); nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._needs_norm():
            self._require_whole_gradients()
        missing = self._read()
        if missing:
            self._init_states(missing)
            self._read()
        devices = self._stepper.devices()
        if len(devices) > 1 and self._needs_norm():
            raise ValueError(
                "max_norm and skip_nonfinite need all parameters on one device; these are on "
                + ", ".join(str(_device_of(code)) for code in devices)
            )
        try:
            for code in devices:
                self._step_on(code)
            # What autograd saved of a parameter is no longer what it was.
            torch.autograd.graph.increment_version(self._stepper.params())
        finally:
            self._stepper.release()
        return loss

    # ---- Checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does: plain tensors, those of paged memory as they lie there.

        Waits for a paged state that is on its way from the device.

        Raises:
            NotImplementedError: a parameter is split over ranks, and its state is 8-bit or paged.
        """
        _state.require_resharding(self.state)
        self._synchronize()
        return super().state_dict()

    def _synchronize(self) -> None:
        if self._paging is not None:
            self._paging.synchronize_to_host(self.state.values())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned: this class's, torch's or bitsandbytes'.

        Each tensor keeps its dtype, and a state that was 8-bit or 32-bit goes on being so.

        Raises:
            ValueError: the groups, or a parameter's state, do not fit; nothing was changed.
        """
        before = self.register_load_state_dict_pre_hook(self._hide_state)
        after = self.register_load_state_dict_post_hook(self._reveal_state, prepend=True)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            before.remove()
            after.remove()

    @staticmethod
    def _hide_state(optimizer: NativeOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved_groups = state_dict["param_groups"]
        params = {
            saved_id: param
            for group, saved in zip(optimizer.param_groups, saved_groups, strict=False)
            for saved_id, param in zip(saved["params"], group["params"], strict=False)
        }
        state = {key: saved for key, saved in state_dict["state"].items() if key not in params}
        loaded = {key: params[key] for key in state_dict["state"] if key in params}
        entries = [
            _state.saved_entries(param, optimizer.moments, state_dict["state"][key])
            for key, param in loaded.items()
        ]
        states = optimizer._states_of(list(loaded.values()), entries)
        for key, own in zip(loaded, states, strict=True):
            state[key] = {name: _Loaded(tensor) for name, tensor in own.items()}
        groups = []
        for saved in saved_groups:
            kept = {name: value for name, value in saved.items() if name not in _FOREIGN_OPTIONS}
            betas = tuple(kept.get("betas", optimizer.defaults["betas"]))[:2]
            groups.append({**optimizer.defaults, **kept, "betas": betas})
        return {"state": state, "param_groups": groups}

    @staticmethod
    def _reveal_state(optimizer: NativeOptimizer) -> None:
        for param, state in optimizer.state.items():
            if isinstance(param, torch.Tensor):
                optimizer.state[param] = {name: box.tensor for name, box in state.items()}

    def __getstate__(self) -> dict[str, Any]:
        self._synchronize()
        return {
            **super().__getstate__(),
            "_options": dict(self._options),
            "_overrides": self._overrides,
            "_given_pool": self._given_pool,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_stepper" in self.__dict__:
            return
        self.__dict__.setdefault("_given_pool", None)  # pickled before there was one
        self._set_up()
        if self._paging is not None:
            # What was copied or unpickled is in ordinary memory.
            params = [param for param in self.state if isinstance(param, torch.Tensor)]
            entries = [
                _state.saved_entries(param, self.moments, self.state[param]) for param in params
            ]
            for param, own in zip(params, self._states_of(params, entries), strict=True):
                self.state[param] = own
