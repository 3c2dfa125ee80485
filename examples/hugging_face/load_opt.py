"""Load an OPT model in 4 bits (NF4, double quantization, bf16 products) and let it write.

    python load_opt.py [MODEL]

The same script for bitsandbytes has BitsAndBytesConfig in place of QLoRANativeConfig, imported from
transformers; nothing else differs.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_native import QLoRANativeConfig

model_id = sys.argv[1] if len(sys.argv) > 1 else "facebook/opt-350m"

quantization_config = QLoRANativeConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(
    model_id, quantization_config=quantization_config, device_map="auto"
)
tokenizer = AutoTokenizer.from_pretrained(model_id)

inputs = tokenizer("Hello, my name is", return_tensors="pt").to(model.device)
outputs = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
print(f"{model.get_memory_footprint() / 2**20:,.1f} MiB for {model.num_parameters():,} parameters")
