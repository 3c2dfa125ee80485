"""QLoRA with PEFT and transformers' Trainer.

    python finetune.py [MODEL [DATA [FOLDER]]]

DATA is a .jsonl file with a `text` or `quote` in every line, or a data set of the hub. The same
script for bitsandbytes has BitsAndBytesConfig in place of QLoRANativeConfig, imported from
transformers; nothing else differs.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from qlora_native import QLoRANativeConfig

defaults = ("facebook/opt-350m", "Abirate/english_quotes", "out")
model_id, dataset, folder = (*sys.argv[1:], *defaults[len(sys.argv) - 1 :])

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
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token

model.gradient_checkpointing_enable()
model = prepare_model_for_kbit_training(model)
model = get_peft_model(
    model,
    LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    ),
)
model.print_trainable_parameters()

if dataset.endswith(".jsonl"):
    data = load_dataset("json", data_files=dataset, split="train")
else:
    data = load_dataset(dataset, split="train")
field = "text" if "text" in data.column_names else "quote"
data = data.map(
    lambda rows: tokenizer(rows[field], truncation=True, max_length=512),
    batched=True,
    remove_columns=data.column_names,
)

trainer = Trainer(
    model=model,
    train_dataset=data,
    args=TrainingArguments(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        warmup_steps=2,
        max_steps=10,
        learning_rate=2e-4,
        logging_steps=1,
        output_dir=folder,
        optim="paged_adamw_8bit",
        report_to="none",
    ),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
model.config.use_cache = False
trainer.train()
model.save_pretrained(folder)
