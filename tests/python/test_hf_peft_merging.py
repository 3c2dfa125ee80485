"""Merging adapters of PEFT into 4 bits: the quantized sum, and back to the bytes of before."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from _hf import four_bit_state, logits, quantized
from _peft_pairs import KINDS, ours_in, pair, two_adapters
from qlora_native.nn import Linear4bit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_a_merge_is_the_quantized_sum_and_goes_back_exactly(kind, safe_merge, options):
    if options.get("lora_bias"):
        if kind != "opt":
            pytest.skip("only OPT's layers have biases")
        options = options | {"target_modules": ["q_proj", "fc1"]}
    ours, theirs = pair(kind, **options)
    before = four_bit_state(ours)
    for model in (ours, theirs):
        model.merge_adapter(safe_merge=safe_merge)
    assert_quantized_merge(ours, theirs, options.get("target_modules", ("",)))
    ours.unmerge_adapter()
    after = four_bit_state(ours)
    assert all(torch.equal(after[key], before[key]) for key in before)
    # And the adapter computes again what it computed.
    theirs.unmerge_adapter()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


def assert_quantized_merge(ours, theirs, targets=("",)):
    compared = 0
    for path, module in ours.named_modules():
        if isinstance(module, Linear4bit) and any(t in path for t in targets):
            merged = theirs.get_submodule(path)
            expected = Linear4bit.from_linear(merged)
            # Equal but where the last bit of a sum decides about a code.
            differs = (module.dequantize() - expected.dequantize()).abs() > 1e-6
            assert differs.float().mean() < 0.01, path
            if module.bias is not None:
                torch.testing.assert_close(module.bias, merged.bias)
            compared += 1
    assert compared


def test_adapters_merged_in_turn_are_quantized_once():
    ours, theirs = two_adapters()
    before = four_bit_state(ours)
    for model in (ours, theirs):
        model.merge_adapter(adapter_names=["default"])
        model.merge_adapter(adapter_names=["second"])
    assert_quantized_merge(ours, theirs)
    assert ours_in(ours)[0].merged_adapters == ["default", "second"]
    with pytest.warns(UserWarning, match="already"):
        ours.merge_adapter(adapter_names=["second"])
    ours.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in four_bit_state(ours).items())


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merge_that_is_not_finite_changes_nothing(safe_merge):
    ours, _ = two_adapters()
    with torch.no_grad():
        ours_in(ours)[0].lora_B["second"].weight[0, 0] = torch.inf
    before = four_bit_state(ours)
    layer = ours_in(ours)[0]
    with pytest.raises(ValueError, match=r"NaN|infinite"):
        layer.merge(safe_merge=safe_merge, adapter_names=["default", "second"])
    assert layer.merged_adapters == []
    assert all(torch.equal(t, before[n]) for n, t in four_bit_state(ours).items())
    layer.merge(adapter_names=["default"])
    merged = layer.base_layer.dequantize()
    with pytest.raises(ValueError, match=r"NaN|infinite"):
        layer.merge(safe_merge=safe_merge, adapter_names=["second"])
    assert layer.merged_adapters == ["default"]
    assert torch.equal(layer.base_layer.dequantize(), merged)


def test_merge_and_unload_leaves_a_4bit_model(tmp_path):
    ours, theirs = pair()
    ours, theirs = ours.merge_and_unload(safe_merge=True), theirs.merge_and_unload()
    assert type(ours) is type(theirs)
    assert not any("lora" in n for n, _ in ours.named_modules())
    assert_quantized_merge(ours, theirs)
    unmerged, _ = pair()
    unloaded = unmerged.unload()
    torch.testing.assert_close(logits(unloaded), logits(quantized("llama")))


def test_disabling_and_deleting_merged_adapters_restores_the_base():
    ours, _ = pair()
    base = logits(quantized("llama"))
    ours.merge_adapter()
    assert not torch.allclose(logits(ours), base, atol=1e-4)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), base)
