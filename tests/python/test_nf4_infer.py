"""examples/cpp/nf4_infer: built against the installed library, and as greedy as transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import _hf
import _hf_models
from qlora_native.hf import QLoRANativeConfig, bitsandbytes_config, save_for_bitsandbytes

SOURCE = Path(__file__).parents[2] / "examples" / "cpp" / "nf4_infer"
NEW_TOKENS = 24
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def core_package() -> Path:
    """The folder in which find_package finds the library that this Python uses."""
    spec = importlib.util.find_spec("qlora_native")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    found = [f / "lib/cmake/qlora_native" for f in folders if (f / "lib/cmake").is_dir()]
    if not found:
        pytest.skip("the library is not installed with its CMake package")
    return found[0]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The example, built by its own CMakeLists.txt as a user would."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("there is no CMake or no C++ compiler")
    build = tmp_path_factory.mktemp("nf4_infer")
    package = f"-Dqlora_native_DIR={core_package()}"
    # What other tests load sets compilers for itself.
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}
    for command in (
        ["cmake", "-S", SOURCE, "-B", build, package, "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"],
        ["cmake", "--build", build, "--parallel", "2"],
    ):
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
    return build / "nf4_infer"


def run(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)


def generate(program, folder, prompt, *arguments):
    text = ",".join(map(str, prompt))
    result = run(program, folder, "--tokens", text, "--max-new-tokens", NEW_TOKENS, *arguments)
    assert result.returncode == 0, result.stderr
    return [int(token) for token in result.stdout.split(",")]


def dense(folder, dtype=torch.bfloat16, **settings):
    torch.manual_seed(1)
    return _hf_models.save(_hf.with_biases(_hf_models.llama(**settings)), folder, dtype)


def quantized(dense_folder, folder, dtype=torch.bfloat16, save=None, **settings):
    config = QLoRANativeConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        dense_folder, quantization_config=config, dtype=dtype
    )
    (save or type(model).save_pretrained)(model, folder)
    return folder


def expected_tokens(folder, prompt, **arguments):
    """What transformers generates over the same 4-bit weights, activations in fp32 as in C++."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments)
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    # Two programs may differ in the last bits: they need not agree on a near tie.
    for scores in output.scores:
        first, second = scores[0].topk(2).values
        assert first - second > 1e-4, "a near tie: take another seed"
    return output.sequences[0, len(prompt) :].tolist()


def a_prompt(length=9):
    return _hf_models.ids((1, length))[0].tolist()


MODELS = {
    "nf4": ({}, {}),
    "nf4 without double quantization": ({}, {"double_quant": False}),
    "fp4 in wide blocks": ({"num_hidden_layers": 3}, {"quant_type": "fp4", "block_size": 128}),
    "int4 in small blocks": ({"num_key_value_heads": 4}, {"quant_type": "int4", "block_size": 32}),
    "rows of an odd length": ({"intermediate_size": 95, "num_key_value_heads": 1}, {}),
    "odd rows, plain scales": ({"intermediate_size": 33}, {"double_quant": False}),
    "wide heads": ({"head_dim": 32}, {}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "tied in 4 bits": ({"tie_word_embeddings": True}, {"quantize_embeddings": True}),
    "a head in 4 bits": ({}, {"modules_to_not_convert": []}),
    "embeddings in 4 bits": ({}, {"quantize_embeddings": True, "double_quant": False}),
    "a layer left dense": ({}, {"modules_to_not_convert": ["q_proj", "lm_head"]}),
    "llama3 positions": ({"rope_parameters": LLAMA3}, {}),
    "stretched positions": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
        {},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(program, tmp_path, name):
    shape, settings = MODELS[name]
    folder = quantized(dense(tmp_path / "dense", **shape), tmp_path / "4bit", **settings)
    prompt = a_prompt()
    assert generate(program, folder, prompt) == expected_tokens(folder, prompt)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dense_parts_in_other_dtypes(program, tmp_path, dtype):
    folder = quantized(dense(tmp_path / "dense", dtype), tmp_path / "4bit", dtype)
    prompt = a_prompt(30)
    assert generate(program, folder, prompt) == expected_tokens(folder, prompt)


def test_shards(program, tmp_path):
    def save(model, folder):
        model.save_pretrained(folder, max_shard_size="20KB")

    folder = quantized(dense(tmp_path / "dense"), tmp_path / "4bit", save=save)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert generate(program, folder, a_prompt()) == expected_tokens(folder, a_prompt())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_layout_of_bitsandbytes(program, tmp_path, quant_type, double_quant):
    folder = quantized(
        dense(tmp_path / "dense", attention_bias=True), tmp_path / "4bit",
        save=save_for_bitsandbytes, quant_type=quant_type, double_quant=double_quant,
    )  # fmt: skip
    expected = expected_tokens(folder, a_prompt(), config=bitsandbytes_config(folder))
    assert generate(program, folder, a_prompt()) == expected


@pytest.mark.parametrize("double_quant", [True, False])
def test_checkpoints_that_bitsandbytes_wrote(program, tmp_path, double_quant):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        dense(tmp_path / "dense"),
        quantization_config=config,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    model.save_pretrained(tmp_path / "4bit")
    expected = expected_tokens(
        tmp_path / "4bit", a_prompt(), config=bitsandbytes_config(tmp_path / "4bit")
    )
    assert generate(program, tmp_path / "4bit", a_prompt()) == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return quantized(dense(folder / "dense", rope_parameters=LLAMA3), folder / "4bit")


def edited(model, folder, file, **changes):
    """A copy with other values in one of its JSON files."""
    shutil.copytree(model, folder)
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5000.0}},
        {"rms_norm_eps": 0.1},
    ],
)
def test_the_configuration_makes_a_difference(program, model, tmp_path, change):
    other = edited(model, tmp_path / "other", "config.json", **change)
    tokens = generate(program, other, a_prompt())
    assert tokens != generate(program, model, a_prompt())
    assert tokens == expected_tokens(other, a_prompt())


def test_configurations_of_transformers_4(program, model, tmp_path):
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old = edited(
        model, tmp_path / "old", "config.json",
        rope_parameters=None, rope_scaling=scaling, rope_theta=LLAMA3["rope_theta"],
    )  # fmt: skip
    assert generate(program, old, a_prompt()) == generate(program, model, a_prompt())


@pytest.mark.parametrize("as_list", [False, True])
def test_the_text_ends_with_its_last_token(program, model, tmp_path, as_list):
    tokens = generate(program, model, a_prompt(), "--ignore-eos")
    last = tokens[4]
    eos = [1_000_000, last] if as_list else last
    short = edited(model, tmp_path / "short", "generation_config.json", eos_token_id=eos)
    expected = tokens[: tokens.index(last) + 1]
    assert generate(program, short, a_prompt()) == expected
    assert generate(program, short, a_prompt(), "--ignore-eos") == tokens


def test_threads_and_timing_leave_the_tokens_alone(program, model):
    prompt = ",".join(map(str, a_prompt()))
    plain = run(program, model, "--tokens", prompt)
    timed = run(program, model, "--tokens", prompt, "--threads", 2, "--timing")
    assert (plain.stderr, timed.returncode) == ("", 0)
    assert timed.stdout == plain.stdout
    assert "tokens/s" in timed.stderr


def assert_refused(result, *words):
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("nf4_infer: ")
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr


def test_wrong_command_lines(program, model):
    assert_refused(run(program), "MODEL")
    assert_refused(run(program, model), "--tokens")
    assert_refused(run(program, model, "--tokens"), "--tokens")
    for tokens in ("", "1,", "1,x", "-1", "1 2", "99999999999999999999"):
        assert_refused(run(program, model, "--tokens", tokens), "--tokens", "number")
    assert_refused(run(program, model, "--tokens", "96"), "96", "vocabulary")
    assert_refused(run(program, model, "--tokens", "1", "--threads", "0"), "--threads")
    assert_refused(run(program, model, "--tokens", "1", "--what"), "--what")
    assert run(program, "--help").stdout.startswith("usage: nf4_infer")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "opt"}, ["config.json", "model_type", "opt"]),
        ({"hidden_size": 128}, ["model.embed_tokens.weight", "[96, 64]", "[96, 128]"]),
        ({"hidden_size": -1}, ["hidden_size", "-1"]),
        ({"hidden_size": "64"}, ["hidden_size"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "4"]),
        ({"head_dim": 15}, ["head_dim", "15"]),
        ({"num_hidden_layers": 3}, ["model.layers.2.input_layernorm.weight"]),
        ({"intermediate_size": 97}, ["gate_proj", "97"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_type", "yarn"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters", "factor"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
    ],
)
def test_configurations_that_do_not_fit(program, model, tmp_path, change, words):
    other = edited(model, tmp_path / "other", "config.json", **change)
    assert_refused(run(program, other, "--tokens", "1"), *words)


def test_files_that_are_broken(program, model, tmp_path):
    assert_refused(run(program, tmp_path / "none", "--tokens", "1"), "none", "config.json")
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(run(program, broken, "--tokens", "1"), str(file))
    file.unlink()
    assert_refused(run(program, broken, "--tokens", "1"), str(broken), "model.safetensors")
