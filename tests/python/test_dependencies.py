"""The core package needs torch and numpy alone."""

import subprocess
import sys

PROGRAM = """
import sys
from importlib.abc import MetaPathFinder

ABSENT = {
    "accelerate", "bitsandbytes", "datasets", "matplotlib", "peft", "rich", "safetensors",
    "transformers", "typer", "yaml",
}


class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
import torch
import qlora_native as qn

model = torch.nn.Sequential(torch.nn.Linear(64, 64))
qn.quantize_model(model)
qn.add_lora(model, r=2)
model(torch.randn(3, 64)).sum().backward()
try:
    qn.save_adapter(model, sys.argv[1])
except ImportError as error:
    assert "pip install safetensors" in str(error), error
else:
    raise SystemExit("an adapter was saved without safetensors")
"""


def test_the_core_runs_without_the_extras(tmp_path):
    target = tmp_path / "adapter"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(target)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not target.exists()
