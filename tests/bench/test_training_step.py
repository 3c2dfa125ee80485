"""bench/python/training_step.py: what it compares, sorts and prints."""

from __future__ import annotations

import json

import pytest
import torch

import random_models
import step_profile
import training_step

pytest.importorskip("transformers")
pytest.importorskip("peft")
CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--shape", "tiny", "--cases", "tiny", "--steps", "2", "--lora-r", "3"]


def test_contestants_have_the_same_weights_and_adapters():
    shape = random_models.SHAPES["tiny"]
    ours = random_models.build(shape.config(), random_models.ours, CPU)
    dense = random_models.build(shape.config(), random_models.dense, CPU)
    layer = "model.layers.1.mlp.down_proj"
    torch.testing.assert_close(
        ours.get_submodule(layer).dequantize(), dense.get_submodule(layer).weight, rtol=0, atol=0
    )
    random_models.add_native_adapters(ours, 3, torch.float32)
    random_models.add_peft_adapters(dense, 3, torch.float32)
    mine = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    theirs = {name: p for name, p in dense.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys()
    assert len(mine) == 2 * 7 * shape.layers
    for name, parameter in mine.items():
        assert parameter.std() > 0
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=0)


def test_layers_of_one_input_are_grouped_when_asked():
    case = training_step.CASES["tiny"]
    for arguments, groups in ((TINY, 0), ([*TINY, "--share-inputs"], 2 * case.layers)):
        options = training_step.parse_options(arguments)
        model = training_step.make_model(options, case, "ours")
        grouped = [m for m in model.modules() if "_groups_together" in vars(m)]
        assert len(grouped) == groups


@pytest.mark.parametrize("case", ["tiny", "tiny-ckpt"])
def test_a_rival_is_checked_against_our_losses(case):
    options = training_step.parse_options(TINY)
    mine = training_step.measure(options, training_step.CASES[case], "ours")
    assert mine["losses"][0] - mine["losses"][-1] > 0.02 > 2e-3 * mine["losses"][0]
    options.expected = mine["losses"]
    rival = training_step.measure(options, training_step.CASES[case], "bf16")
    assert rival["median_ms"] > 0
    assert rival["tokens_per_s"] == pytest.approx(96e3 / rival["median_ms"])
    assert rival["groups_ms"]["LoRA"] > 0
    options.expected = [loss * 1.01 for loss in mine["losses"]]
    with pytest.raises(training_step.LossMismatchError, match="step 0"):
        training_step.measure(options, training_step.CASES[case], "bf16")


def test_the_table_names_what_failed(monkeypatch, capsys, tmp_path):
    seen = []

    def child(options, case, contestant):
        seen.append((contestant, options.expected))
        if contestant == "bf16":
            return {"case": case, "contestant": contestant, "error": "no memory"}
        groups = dict.fromkeys(step_profile.GROUPS, 1.25)
        return {
            "case": case, "contestant": contestant, "losses": [2.0], "median_ms": 12.5,
            "tokens_per_s": 8000.0, "groups_ms": groups, "idle_ms": 5.0, "kernels": 7,
            "launches": None, "peak_bytes": 3_210_000_000,
        }  # fmt: skip

    monkeypatch.setattr(training_step, "run_child", child)
    file = tmp_path / "records.json"
    arguments = [*TINY, "--contestants", "bf16", "--json", str(file)]
    assert training_step.main(arguments) == 1
    assert seen == [("ours", None), ("bf16", [2.0])]
    printed = capsys.readouterr().out
    assert "| tiny | ours | 12.5 | 8,000 | 1.2 |" in printed
    assert "| 7 | - | 3.21 |" in printed
    assert "failed: no memory" in printed
    saved = json.loads(file.read_text())
    assert len(saved["records"]) == 2
    assert saved["options"]["loss"] == "chunked" and saved["options"]["share_inputs"] is False


def test_a_child_that_fails_says_its_last_line(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('out of luck')")
    monkeypatch.setattr(training_step, "__file__", str(broken))
    options = training_step.parse_options(TINY)
    assert training_step.run_child(options, "tiny", "ours")["error"] == "out of luck"


def test_options_that_cannot_be():
    for wrong in (["--cases", "huge"], ["--contestants", "ours graphed"]):
        with pytest.raises(SystemExit):
            training_step.parse_options([*TINY, *wrong])


OURS = "void qlora_native::cuda::(anonymous namespace)::"


@pytest.mark.parametrize(
    ("launch", "group"),
    [
        ((OURS + "gemm_sm90a_kernel<Config>", "", []), "base GEMM"),
        ((OURS + "step_kernel<float>", "", []), "optimizer"),
        ((OURS + "sum_kernel<float>", "", []), "optimizer"),
        (("kDequantizeBlockwise<__nv_bfloat16>", "bnb::dequantize", []), "base GEMM"),
        (("nvjet_tst_128x256", "aten::mm", [[8192, 4096], [4096, 14336]]), "base GEMM"),
        (("nvjet_tst_64x8", "aten::mm", [[8192, 4096], [4096, 16]]), "LoRA"),
        (("elementwise_kernel", "aten::copy_", [[16, 4096], [16, 4096], []]), "LoRA"),
        (("nvjet_tst_128x256", "aten::mm", [[8192, 4096], [4096, 128256]]), "loss"),
        (("cunn_SoftMaxForward", "aten::_log_softmax", [[8192, 128256]]), "loss"),
        (("indexSelectLargeIndex", "aten::index_select", [[128256, 4096]]), "elementwise"),
        (("flash_fwd_kernel", "aten::_scaled_dot_product_flash_attention", []), "attention"),
        (("triton_poi_fused_add_mul_3", "triton_poi_fused_add_mul_3", []), "elementwise"),
        (("multi_tensor_apply_kernel", "aten::_fused_adamw_", [[16, 4096]]), "optimizer"),
    ],
)
def test_kernels_are_sorted(launch, group):
    assert step_profile.group_of(launch, r=16, vocab=128256) == group


def test_a_trace_is_summed_up():
    def kernel(name, ts, dur, external=None):
        args = {} if external is None else {"External id": external}
        return {"cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": args}

    events = [
        {"cat": "cpu_op", "name": "aten::mm", "args": {"External id": 5, "Input Dims": [[9, 16]]}},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "args": {}},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "args": {}},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "args": {}},
        kernel("nvjet", 1000.0, 2000.0, external=5),
        kernel(OURS + "gemm_sm90a_kernel", 2000.0, 4000.0),
        {"cat": "gpu_memset", "name": "Memset", "ts": 9000.0, "dur": 1000.0, "args": {}},
    ]
    found = step_profile.of_trace(events, steps=2, r=16, vocab=99)
    assert found["groups_ms"]["LoRA"] == pytest.approx(1.0)
    assert found["groups_ms"]["base GEMM"] == pytest.approx(2.0)
    assert found["groups_ms"]["elementwise"] == pytest.approx(0.5)
    assert found["busy_ms"] == pytest.approx((5.0 + 1.0) / 2)
    assert (found["kernels"], found["launches"]) == (2, 1)
    assert found["top"][0] == [OURS + "gemm_sm90a_kernel", 2.0]
