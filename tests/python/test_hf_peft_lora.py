"""LoRA of PEFT over 4-bit layers: the same values, files and merges as over decoded weights."""

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from peft import LoraConfig, PeftModel, get_peft_model

import qlora_native as qn
from _dropout import CounterDropout
from _hf import IDS, dense_twin, fill, four_bit_state, logits, loss_and_gradients, quantized
from _peft_pairs import ALL, KINDS, adapted_model, ours_in, pair, two_adapters
from qlora_native.hf import peft_lora
from qlora_native.nn import Linear4bit, adapted


def assert_same_step(ours, theirs, rtol=1e-5, atol=1e-6):
    got, gradients = loss_and_gradients(ours)
    expected, expected_gradients = loss_and_gradients(theirs)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        assert gradient is not None, key
        error = (gradients[key] - gradient).norm()
        assert error <= 10 * rtol * gradient.norm() + atol, key


def drop_as_we_do(model):
    """Put the dropout of our product, which draws other numbers, in the place of torch's."""
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            for name, dropout in module.lora_dropout.items():
                if isinstance(dropout, torch.nn.Dropout):
                    module.lora_dropout[name] = CounterDropout(dropout.p)


@pytest.fixture
def products(monkeypatch):
    """Counts the products that go our way."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return adapted.adapted_linear(*arguments)

    monkeypatch.setattr(peft_lora, "adapted_linear", counted)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_means_the_4bit_layers(kind):
    model, twin = pair(kind)
    layers = ours_in(model)
    assert len(layers) == sum(isinstance(m, peft.tuners.lora.Linear) for m in twin.modules())
    assert all(isinstance(layer.base_layer, Linear4bit) for layer in layers)
    assert model.peft_config["default"].target_modules == twin.peft_config["default"].target_modules
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in n for n in names)
    assert model.get_nb_trainable_parameters() == twin.get_nb_trainable_parameters()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"r": 3, "lora_alpha": 5, "use_rslora": True}, True),
        ({"lora_dropout": 0.3}, True),
        ({"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 1}}, True),
        ({"use_dora": True}, False),
        ({"use_dora": True, "lora_dropout": 0.3}, False),
        ({"lora_bias": True}, False),
    ],
    ids=str,
)
def test_a_step_is_that_over_the_decoded_weights(kind, options, fused, products):
    ours, theirs = pair(kind, **options)
    if fused:
        drop_as_we_do(theirs)
    for model in (ours, theirs):
        model.train()
    assert_same_step(ours, theirs)
    assert len(products) == (len(ours_in(ours)) if fused else 0)


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_bfloat16_activations_agree_within_rounding(compute_dtype):
    base = quantized("llama", torch.bfloat16, compute_dtype=compute_dtype)
    twin = dense_twin(base)
    config = LoraConfig(**ALL)
    ours, theirs = adapted_model(base, config), adapted_model(twin, config)
    assert all(p.dtype == torch.float32 for n, p in ours.named_parameters() if "lora_" in n)
    assert_same_step(ours, theirs, rtol=2e-2, atol=2e-2)
    assert logits(ours).dtype == torch.bfloat16


def test_autocast():
    ours, theirs = pair()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0.02, atol=0.02)


def test_watched_and_replaced_parts_take_the_general_path(products):
    model, twin = pair(target_modules=["q_proj"])
    first, second = ours_in(model)
    seen = []
    first.lora_A["default"].register_forward_hook(lambda *a: seen.append(1))
    second.lora_B["default"] = torch.nn.utils.parametrizations.weight_norm(second.lora_B["default"])
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-6)
    assert seen == [1]
    assert products == []
    with peft.helpers.disable_input_dtype_casting(model):
        torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-6)


def test_the_model_compiles_in_one_graph():
    model, twin = pair("llama")
    layer, reference = (
        ours_in(model)[0],
        twin.get_submodule(
            next(n for n, m in model.named_modules() if isinstance(m, peft_lora.Linear))
        ),
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 32, requires_grad=True)
    y = compiled(x)
    y.square().sum().backward()
    gradient, x.grad = x.grad, None
    expected = reference(x)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, x.grad, rtol=1e-4, atol=1e-5)


# ---- several adapters ----


def test_adapters_switch_mix_and_disable():
    ours, theirs = two_adapters()
    outputs = {}
    for name in ("default", "second"):
        for model in (ours, theirs):
            model.set_adapter(name)
        outputs[name] = logits(ours)
        torch.testing.assert_close(outputs[name], logits(theirs), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs["default"], outputs["second"], atol=1e-4)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    with ours.disable_adapter(), theirs.disable_adapter():
        base = logits(ours)
        torch.testing.assert_close(base, logits(theirs), rtol=1e-5, atol=1e-6)
    ours.eval()
    mixed = logits(ours, adapter_names=["second", "__base__"])
    torch.testing.assert_close(mixed[0], outputs["second"][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[1], base[1], rtol=1e-5, atol=1e-6)
    ours.delete_adapter("default")
    ours.set_adapter("second")
    torch.testing.assert_close(logits(ours), outputs["second"], rtol=1e-5, atol=1e-6)


def test_weighted_adapters():
    ours, theirs = two_adapters()
    for model in (ours, theirs):
        model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "sum", "cat")
        model.set_adapter("sum")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


# ---- files ----


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_files_are_the_stock_ones(tmp_path, options, low_cpu_mem_usage):
    ours, theirs = pair(**options)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    expected = logits(ours)
    for base, folder in ((quantized("llama"), "theirs"), (dense_twin(quantized("llama")), "ours")):
        loaded = PeftModel.from_pretrained(
            base, tmp_path / folder, low_cpu_mem_usage=low_cpu_mem_usage
        )
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
        assert not any(p.requires_grad for p in loaded.parameters())


def test_our_own_adapters_read_the_file(tmp_path):
    model, _ = pair()
    model.save_pretrained(tmp_path)
    base = quantized("llama")
    qn.load_adapter(base, tmp_path)
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-5, atol=1e-6)


def test_hotswap(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    first, _ = pair()
    second = fill(copy.deepcopy(first), seed=9)
    second.save_pretrained(tmp_path)
    hotswap_adapter(first, tmp_path, adapter_name="default")
    torch.testing.assert_close(logits(first), logits(second), rtol=1e-5, atol=1e-6)


def test_transformers_own_adapter_methods(tmp_path):
    model = quantized("llama")
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(**ALL))
    fill(model)
    assert ours_in(model)
    model.save_pretrained(tmp_path)
    again = quantized("llama")
    again.load_adapter(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    model.disable_adapters()
    torch.testing.assert_close(logits(model), logits(quantized("llama")))


# ---- initializations that read the weight ----


@pytest.mark.parametrize(
    ("init", "rewrites"),
    [
        ("pissa", True),
        ("pissa_niter_4", True),
        ("olora", True),
        ("mica", False),
        ("orthogonal", False),
        ("gaussian", False),
    ],
)
def test_initializations_start_from_the_decoded_weight(init, rewrites):
    base = quantized("llama")
    start = logits(base)
    twin = dense_twin(base)
    decoded = {n: m.weight.clone() for n, m in twin.named_modules() if hasattr(m, "weight")}
    config = LoraConfig(**(ALL | {"init_lora_weights": init, "r": 4}))
    models = []
    for model in (base, twin):
        torch.manual_seed(0)
        models.append(get_peft_model(model, copy.deepcopy(config)))
    ours, theirs = models
    for name, layer in ours.named_modules():
        if not isinstance(layer, peft_lora.Linear):
            continue
        reference = theirs.get_submodule(name)
        for part in ("lora_A", "lora_B"):
            got = getattr(layer, part)["default"].weight
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, getattr(reference, part)["default"].weight)
        weight = decoded[name.removeprefix("base_model.model.")]
        if rewrites:
            # The base is the quantized remainder, with what 4 bits lose of it.
            expected = Linear4bit.from_linear(reference.base_layer).dequantize()
            torch.testing.assert_close(layer.base_layer.dequantize(), expected)
            assert not torch.equal(layer.base_layer.dequantize(), weight)
            effective = layer.base_layer.dequantize() + layer.get_delta_weight("default")
            assert (effective - weight).norm() < 0.12 * weight.norm()
        else:
            assert torch.equal(layer.base_layer.dequantize(), weight)
    if init == "gaussian":
        torch.testing.assert_close(logits(ours), start)


def test_initializations_that_rewrite_refuse_a_merged_base():
    model, _ = pair()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge first"):
        model.add_adapter("second", LoraConfig(**(ALL | {"init_lora_weights": "pissa"})))


# ---- what else a model holds ----


def test_modules_to_save_of_a_4bit_layer_train_dense(tmp_path):
    base = quantized("llama", skip=())
    assert isinstance(base.lm_head, Linear4bit)
    twin = dense_twin(base)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **{"r": 4})
    ours, theirs = adapted_model(base, config), adapted_model(twin, config)
    assert type(ours.base_model.model.lm_head.modules_to_save["default"]) is torch.nn.Linear
    assert isinstance(ours.base_model.model.lm_head.original_module, Linear4bit)
    assert_same_step(ours, theirs)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized("llama", skip=()), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(ours), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_prepare_model_for_kbit_training(reentrant):
    model = quantized("llama", torch.bfloat16)
    options = {} if reentrant is None else {"use_reentrant": reentrant}
    prepared = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options)
    assert prepared is model
    assert model.is_gradient_checkpointing
    assert not any(p.requires_grad for p in model.parameters())
    dtypes = {p.dtype for p in model.parameters()}
    assert dtypes == {torch.uint8, torch.float32}
    ours = adapted_model(model, LoraConfig(**ALL)).train()
    _, gradients = loss_and_gradients(ours)
    assert all(g is not None and g.any() for g in gradients.values())


def test_prepare_model_for_kbit_training_without_checkpointing():
    model = peft.prepare_model_for_kbit_training(
        quantized("llama"), use_gradient_checkpointing=False
    )
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_our_prepare_for_training_takes_peft_models(reentrant):
    ours, theirs = pair()
    qn.prepare_for_training(ours, use_reentrant=reentrant)
    assert ours.is_gradient_checkpointing
    ours.train()
    assert_same_step(ours, theirs)


def test_layers_of_others_are_left_to_peft():
    _, theirs = pair()
    assert not ours_in(theirs)


def test_replacements_are_made_once():
    from peft.tuners.tuners_utils import BaseTuner

    from qlora_native.hf import peft_hooks

    before = BaseTuner.inject_adapter
    peft_hooks.install()
    assert BaseTuner.inject_adapter is before


def test_quantizing_after_adapting_leaves_the_adapted_layers_alone():
    model = adapted_model(dense_twin(quantized("llama")), LoraConfig(target_modules=["q_proj"]))
    before = logits(model)
    report = qn.quantize_model(model)
    reasons = {name: reason for name, reason in report.skipped}
    for part in ("base_layer", "lora_A.default", "lora_B.default"):
        path = f"base_model.model.model.layers.0.self_attn.q_proj.{part}"
        assert reasons[path] == "in an adapter of PEFT: quantize first, then add adapters"
    assert len(report.converted) == 12
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_every_device_computes_and_merges_alike(device, options):
    models = [pair(**options)[0] for _ in range(2)]
    models[1].to(device)
    outputs = []
    for model, place in zip(models, ("cpu", device), strict=True):
        ids = IDS.to(place)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad.cpu() for p in model.parameters() if p.requires_grad]
        before = four_bit_state(model)
        model.merge_adapter()
        merged = logits_on(model, ids).cpu()
        model.unmerge_adapter()
        assert all(torch.equal(t, before[n]) for n, t in four_bit_state(model).items())
        outputs.append([loss.detach().cpu(), merged, *gradients])
    for got, expected in zip(outputs[1], outputs[0], strict=True):
        assert (got - expected).norm() <= 2e-3 * expected.norm() + 1e-6


def logits_on(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits
