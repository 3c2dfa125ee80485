"""liger-kernel is asked for what it has, and refused where it would be wrong."""

import sys
import types

import pytest
import torch

from qlora_native.hf import liger
from qlora_native.nn import Linear4bit
from qlora_native.training import UnsupportedModelError


class Model:
    """What is asked of a model."""

    def __init__(self, head, device="cuda", kind="llama"):
        self.config = types.SimpleNamespace(model_type=kind)
        self._head = head
        self._device = torch.device(device)

    def get_input_embeddings(self):
        return types.SimpleNamespace(weight=types.SimpleNamespace(device=self._device))

    def get_output_embeddings(self):
        return self._head


@pytest.fixture
def asked(monkeypatch):
    """What is asked of liger-kernel, which stands in for itself."""
    calls = []
    package = types.ModuleType("liger_kernel")
    api = types.ModuleType("liger_kernel.transformers")
    patches = types.ModuleType("liger_kernel.transformers.monkey_patch")
    api._apply_liger_kernel_to_instance = lambda **arguments: calls.append(arguments)
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for module in (package, api, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: package)
    return calls


@pytest.mark.parametrize("loss", [False, True])
def test_it_is_asked_for_layers_and_for_the_loss_alone(asked, loss):
    model = Model(torch.nn.Linear(4, 8))
    wrapped = types.SimpleNamespace(get_base_model=lambda: model)
    liger.use_liger_kernels(wrapped, loss=loss)
    assert asked == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": loss}]


def test_where_it_would_be_wrong_nothing_is_changed(asked, monkeypatch):
    dense = torch.nn.Linear(64, 8)
    packed = Linear4bit.from_linear(dense)
    cases = [
        (Model(dense, device="cpu"), False, "needs a GPU, and the model is on cpu"),
        (Model(packed), True, "takes a dense head, which is a Linear4bit"),
        (Model(dense, kind="mamba"), False, "liger-kernel has nothing for mamba"),
    ]
    for model, loss, message in cases:
        with pytest.raises(UnsupportedModelError, match=message):
            liger.use_liger_kernels(model, loss=loss)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match="liger-kernel is not installed"):
        liger.use_liger_kernels(Model(dense))
    assert asked == []


@pytest.mark.gpu
def test_on_a_gpu_a_llama_learns_the_same():
    pytest.importorskip("liger_kernel")
    from _hf import tiny

    ids = torch.randint(0, 64, (2, 16), device="cuda")
    losses = {}
    for loss in (None, False, True):
        model = tiny("llama").cuda().train()
        if loss is not None:
            liger.use_liger_kernels(model, loss=loss)
        losses[loss] = model(input_ids=ids, labels=ids).loss.item()
    assert losses[False] == pytest.approx(losses[None], rel=1e-3)
    assert losses[True] == pytest.approx(losses[None], rel=1e-3)
