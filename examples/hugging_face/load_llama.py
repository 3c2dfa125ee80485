"""Load a Llama in 4 bits (NF4, double quantization, bf16 products), save that, load it again.

    python load_llama.py [MODEL [FOLDER]]

The same script for bitsandbytes has BitsAndBytesConfig in place of QLoRANativeConfig, imported from
transformers; nothing else differs.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_native import QLoRANativeConfig

model_id = sys.argv[1] if len(sys.argv) > 1 else "huggyllama/llama-7b"
folder = sys.argv[2] if len(sys.argv) > 2 else "llama-4bit"

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
with torch.no_grad():
    before = model(**inputs).logits

model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
again = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
with torch.no_grad():
    after = again(**inputs).logits
print(f"{model.get_memory_footprint() / 2**20:,.1f} MiB; reloaded bit for bit:", end=" ")
print(torch.equal(before, after))
