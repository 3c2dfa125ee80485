"""Training with transformers' Trainer, accelerate and TRL over 4-bit models."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from peft import LoraConfig, get_peft_model

import qlora_native as qn
from _hf import quantized, tiny
from _training import LORA, adapter_state, arguments, losses, texts, trainer
from qlora_native import optim
from qlora_native.hf import QLoRANativeConfig, use_as_paged_optimizers
from qlora_native.nn import Linear4bit
from qlora_native.nn.targets import replace_module
from qlora_native.training import ActivationOffload, use_checkpointing


def adapted(kind="llama", **options):
    torch.manual_seed(3)
    return get_peft_model(quantized(kind), LoraConfig(**(LORA | options)))


@pytest.fixture
def handlers():
    """Restores transformers' table of optimizers."""
    from transformers import trainer_optimizer

    before = dict(trainer_optimizer._OPTIMIZER_HANDLERS)
    yield
    trainer_optimizer._OPTIMIZER_HANDLERS.clear()
    trainer_optimizer._OPTIMIZER_HANDLERS.update(before)


@pytest.fixture
def loadable(tmp_path):
    """A model loaded in 4 bits by transformers, which Trainer knows as quantized."""
    import transformers

    tiny("llama").save_pretrained(tmp_path / "model")

    def load():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=QLoRANativeConfig(), dtype=torch.float32
        )
        return get_peft_model(model, LoraConfig(**LORA))

    return load


def test_a_quantized_model_trains(tmp_path, loadable):
    model = loadable()
    base = {n: t.clone() for n, t in model.state_dict().items() if "base_layer" in n}
    run = trainer(model, arguments(tmp_path, max_steps=20))
    run.train()
    assert sum(losses(run)[-5:]) < 0.97 * sum(losses(run)[:5])
    assert all(torch.equal(model.state_dict()[n], t) for n, t in base.items())
    with pytest.raises(ValueError, match="quantized"):
        trainer(loadable().unload(), arguments(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_gradient_checkpointing_changes_no_loss(tmp_path, kind):
    runs = []
    for options in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ):
        options = {"gradient_checkpointing": True} | options
        run = trainer(adapted(kind), arguments(tmp_path, max_steps=3, **options))
        run.train()
        runs.append(losses(run))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert runs[2] == pytest.approx(runs[0], rel=1e-5)


class Entered(ActivationOffload):
    """Counts the layers that offload."""

    count = 0

    def __enter__(self):
        self.count += 1
        return super().__enter__()


def test_offloading_is_in_use_in_every_layer_and_step(tmp_path):
    runs = []
    offload = Entered(min_bytes=1)
    for mode in (None, offload):
        model = adapted()
        use_checkpointing(model, "full", offload=mode)
        run = trainer(model, arguments(tmp_path, max_steps=3))
        run.train()
        runs.append(losses(run))
    assert runs[0] == runs[1]
    assert offload.count == 3 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "lion_32bit"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, handlers, name):
    use_as_paged_optimizers()
    # Ranks large enough that the 8-bit optimizer keeps 8-bit state.
    options = {"r": 128}
    whole = trainer(
        adapted(**options),
        arguments(tmp_path, optim=name, max_steps=6, save_strategy="steps", save_steps=3),
    )
    whole.train()
    resumed = trainer(adapted(**options), arguments(tmp_path, optim=name, max_steps=6))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    a, b = adapter_state(whole.model), adapter_state(resumed.model)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    states = [run.optimizer.state_dict()["state"] for run in (whole, resumed)]
    for key, state in states[0].items():
        for part, value in state.items():
            assert torch.equal(torch.as_tensor(states[1][key][part]), torch.as_tensor(value))
    dtypes = {t.dtype for s in states[0].values() for t in s.values() if torch.is_tensor(t)}
    assert (torch.uint8 in dtypes) == (name == "paged_adamw_8bit")


def test_losses_are_those_over_bitsandbytes(tmp_path):
    """The same seed and the same 4-bit bytes: 50 steps agree within 1 %."""
    bnb = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    dense, base, theirs = (tiny("llama", **sizes) for _ in range(3))
    qn.quantize_model(base)
    for name, module in list(base.named_modules()):
        if not isinstance(module, Linear4bit):
            continue
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.float32,
            quant_type="nf4",
        )
        weight = dense.get_submodule(name).weight.data
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        layer.to("cpu")
        assert torch.equal(layer.weight.data.flatten(), module.weight.flatten()), name
        replace_module(theirs, name, layer)
    runs = []
    for model in (base, theirs):
        torch.manual_seed(3)
        # PEFT looks at the class of the layer, and would want a model loaded by bitsandbytes.
        model.is_loaded_in_4bit = model is theirs
        adapted_model = get_peft_model(model, LoraConfig(**LORA))
        run = trainer(adapted_model, arguments(tmp_path, max_steps=50))
        run.train()
        runs.append(losses(run))
    ours, reference = runs
    assert len(ours) == 50
    assert sum(ours[-5:]) < 0.95 * sum(ours[:5])
    assert ours == pytest.approx(reference, rel=0.01)


SCRIPT = """
import json, sys
import torch
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(1)
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from _hf import quantized
from _training import LORA, adapter_state, texts
from qlora_native import optim

accelerator = Accelerator(cpu=True)
torch.manual_seed(3)
model = get_peft_model(quantized("llama"), LoraConfig(**LORA)).train()
optimizer = optim.AdamW8bit((p for p in model.parameters() if p.requires_grad), lr=5e-3)
data = [row for row in texts(8)]
loader = torch.utils.data.DataLoader(data, batch_size=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

def epoch():
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

epoch()
accelerator.save_state(sys.argv[1] + "/state")
epoch()
inner = accelerator.unwrap_model(model)
first = adapter_state(inner)
accelerator.load_state(sys.argv[1] + "/state")
epoch()
second = adapter_state(inner)
same = all(torch.equal(first[key], second[key]) for key in first)
total = sum(float(value.double().abs().sum()) for value in second.values())
totals = accelerator.gather(torch.tensor([total], dtype=torch.float64)).tolist()
if accelerator.is_main_process:
    with open(sys.argv[1] + "/report.json", "w") as file:
        json.dump({"processes": accelerator.num_processes, "same": same, "totals": totals}, file)
accelerator.end_training()
"""


def test_accelerate_launch(tmp_path):
    """Data parallelism over gloo: the ranks agree, and a saved state goes on bit for bit."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    # --multi_gpu starts the processes; that they run on the CPU, over gloo, the script says.
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
        "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0",
    ]  # fmt: skip
    result = subprocess.run(
        [*launch, str(script), str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["processes"] == 2
    assert report["same"]
    assert len(set(report["totals"])) == 1


def test_trl(tmp_path, handlers):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    use_as_paged_optimizers()
    rows = [{"input_ids": row["input_ids"].tolist()} for row in texts()]
    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, logging_steps=1,
        report_to="none", use_cpu=True, optim="paged_adamw_8bit", save_strategy="no", bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True,
    )  # fmt: skip
    run = trl.SFTTrainer(
        model=quantized("llama"),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=LoraConfig(**LORA),
        processing_class=tokenizer(),
    )
    run.train()
    assert type(run.optimizer.optimizer) is optim.PagedAdamW8bit
    assert run.state.log_history[0]["loss"] > 0


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(62)} | {"<pad>": 62, "</s>": 63}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
