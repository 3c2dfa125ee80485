"""Our optimizers in transformers' Trainer, by argument and in place of bitsandbytes'."""

import subprocess
import sys

import pytest
import torch

import qlora_native as qn

transformers = pytest.importorskip("transformers")


class Regression(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x, y):
        return {"loss": (self.layer(x) - y).square().mean()}


def arguments(tmp_path, **options):
    return transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, learning_rate=1e-2, adam_beta2=0.99, use_cpu=True,
        weight_decay=0.1, report_to="none", disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip


def trained(args, **options):
    generator = torch.Generator().manual_seed(1)
    rows = [{k: torch.randn(64, generator=generator) for k in "xy"} for _ in range(64)]
    trainer = transformers.Trainer(Regression(), args, train_dataset=rows, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["adamw", "paged_adamw", "paged_adamw8bit", "paged_lion8bit"])
def test_trainer_takes_it_by_argument(tmp_path, name):
    args = arguments(tmp_path)
    chosen = qn.hf.optimizer_cls_and_kwargs(name, args)
    trainer = trained(args, optimizer_cls_and_kwargs=chosen)
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is qn.hf.optimizers.OPTIMIZERS[name]
    assert optimizer.defaults["betas"] == (0.9, 0.99)
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, 0.1}
    if not name.endswith("8bit"):
        reference = trained(arguments(tmp_path, optim="adamw_torch"))
        torch.testing.assert_close(
            trainer.model.layer.weight, reference.model.layer.weight, rtol=1e-6, atol=1e-6
        )


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'adamx'.*paged_adamw"):
        qn.hf.optimizer_cls_and_kwargs("adamx", arguments(tmp_path))


SCRIPT = """
import sys
sys.modules["bitsandbytes"] = None  # not installed
import transformers
import qlora_native as qn
from test_hf_optimizers import arguments, trained

names = qn.hf.use_as_paged_optimizers()
assert {"paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit"} <= set(names)
for name in names:
    optimizer = trained(arguments(sys.argv[1], optim=name)).optimizer.optimizer
    assert isinstance(optimizer, qn.optim.Lion if "lion" in name else qn.optim.AdamW), name
    assert ("Paged" in type(optimizer).__name__) == name.startswith("paged"), name
    assert ("8bit" in type(optimizer).__name__) == name.endswith("8bit"), name
"""


def test_scripts_that_ask_for_bitsandbytes_get_ours(tmp_path, request):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True, text=True, timeout=300, cwd=request.path.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
