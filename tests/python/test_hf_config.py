"""QLoRANativeConfig: its own names, bitsandbytes' names, and what goes into config.json."""

import json

import pytest
import torch
from transformers import BitsAndBytesConfig

from qlora_native.hf import QLoRANativeConfig, import_hook


def test_defaults_are_nf4_with_double_quantization():
    config = QLoRANativeConfig()
    assert (config.quant_type, config.double_quant, config.block_size) == ("nf4", True, 64)
    assert config.compute_dtype is None
    assert config.modules_to_not_convert is None


def test_the_names_of_bitsandbytes_mean_the_same():
    ours = QLoRANativeConfig(
        quant_type="fp4",
        double_quant=False,
        compute_dtype=torch.bfloat16,
        modules_to_not_convert=["lm_head"],
    )
    theirs = QLoRANativeConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage="uint8",
        llm_int8_skip_modules=["lm_head"],
    )
    assert theirs.to_dict() == ours.to_dict()


def test_from_bnb_is_what_the_other_config_says():
    bnb = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
        llm_int8_skip_modules=["lm_head", "score"],
    )
    for source in (bnb, bnb.to_dict()):
        config = QLoRANativeConfig.from_bnb(source)
        assert config.quant_type == "nf4"
        assert config.double_quant
        assert config.compute_dtype == torch.float16
        assert config.modules_to_not_convert == ["lm_head", "score"]
    assert QLoRANativeConfig.from_bnb(bnb, compute_dtype="float32").compute_dtype == torch.float32


def test_from_bnb_keeps_its_defaults():
    config = QLoRANativeConfig.from_bnb({"load_in_4bit": True})
    assert (config.quant_type, config.double_quant) == ("fp4", False)
    config = QLoRANativeConfig.from_bnb(BitsAndBytesConfig(load_in_4bit=True))
    assert (config.quant_type, config.double_quant) == ("fp4", False)
    assert config.compute_dtype == torch.float32


def test_an_8_bit_config_is_refused():
    with pytest.raises(ValueError, match="4 bits"):
        QLoRANativeConfig.from_bnb(BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match="4 bits"):
        QLoRANativeConfig(load_in_4bit=False)


def test_the_dict_is_json_and_gives_the_config_back():
    config = QLoRANativeConfig(compute_dtype=torch.float16, quantize_embeddings=True)
    text = json.dumps(config.to_dict())
    assert QLoRANativeConfig.from_dict(json.loads(text)).to_dict() == config.to_dict()
    assert dict(config) == config.to_dict()


def test_the_dict_names_no_load_in_4bit():
    """transformers would take a truthy one for bitsandbytes' and ignore quant_method."""
    assert not [key for key in QLoRANativeConfig(load_in_4bit=True).to_dict() if "load_in" in key]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quant_type": "int8"}, ValueError, "int8"),
        ({"quant_type": "custom"}, ValueError, "custom"),
        ({"block_size": 48}, ValueError, "48"),
        ({"compute_dtype": "float64"}, ValueError, "float64"),
        ({"compute_dtype": "half-ish"}, ValueError, "half-ish"),
        ({"double_quant": "yes"}, TypeError, "yes"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "lm_head"),
        ({"checkpoint_format": "gguf"}, ValueError, "gguf"),
        ({"group_size": 64}, TypeError, "group_size"),
        ({"quant_type": "fp4", "bnb_4bit_quant_type": "nf4"}, TypeError, "contradict"),
        ({"quant_method": "gptq"}, ValueError, "gptq"),
    ],
)
def test_a_bad_value_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        QLoRANativeConfig(**arguments)


def test_a_transformers_that_could_not_be_extended_is_told(monkeypatch):
    failure = import_hook.IntegrationError("cannot extend it")
    monkeypatch.setitem(import_hook._failures, "transformers.quantizers", failure)
    with pytest.raises(import_hook.IntegrationError, match="cannot extend it"):
        QLoRANativeConfig()
