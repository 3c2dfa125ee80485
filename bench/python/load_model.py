"""Time and memory of loading a dense checkpoint in 4 bits by transformers, beside bitsandbytes.

    python bench/python/load_model.py [--layers 18] [--repeat 3] [--device cpu]

Makes a random Llama in bf16 (1.8 GB with 18 layers) in a temporary folder, reads its files once so
that they are in memory, and loads it in a fresh process per library and repetition. Memory is the
process's anonymous memory on the CPU: mapped files are not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

LIBRARIES = ("qlora_native", "bitsandbytes")


def make_checkpoint(folder: str, layers: int) -> int:
    """Writes the model; returns the bytes of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=2048,
                intermediate_size=5632,
                num_hidden_layers=layers,
                num_attention_heads=32,
                num_key_value_heads=4,
            )
        ).to(torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model.save_pretrained(folder, max_shard_size="700MB")
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def anonymous_mib() -> float:
    """Anonymous resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def load(folder: str, library: str, device: str) -> dict[str, float]:
    """Loads the model in this process and gives seconds and MiB."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.models.llama import modeling_llama  # noqa: F401 - not part of the time

    if library == "qlora_native":
        from qlora_native import QLoRANativeConfig

        config = QLoRANativeConfig(compute_dtype="bfloat16")
    else:
        import bitsandbytes  # noqa: F401 - not part of the time

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    peak, done = [anonymous_mib()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": device}
    )
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    result = {"seconds": seconds, "peak_mib": peak[0], "final_mib": anonymous_mib()}
    if device != "cpu":
        result["gpu_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        result["gpu_final_mib"] = torch.cuda.memory_allocated() / 2**20
    return result | {"model_mib": model.get_memory_footprint() / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "LIBRARY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(load(*options.child, options.device)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = make_checkpoint(folder, options.layers)
        print(f"{size / 1e9:.2f} GB in bf16, {options.device}")
        command = [sys.executable, __file__, "--device", options.device, "--child", folder]
        times = {}
        for library in LIBRARIES:
            for path in Path(folder).glob("*.safetensors"):
                path.read_bytes()
            runs = [
                json.loads(
                    subprocess.run(
                        [*command, library], capture_output=True, text=True, check=True
                    ).stdout.splitlines()[-1]
                )
                for _ in range(options.repeat)
            ]
            times[library] = statistics.median(run["seconds"] for run in runs)
            figures = ", ".join(
                f"{key} {statistics.median(run[key] for run in runs):.2f}" for key in runs[0]
            )
            print(f"{library}: {figures}")
        print(f"x bitsandbytes: {times['bitsandbytes'] / times['qlora_native']:.1f}")


if __name__ == "__main__":
    main()
