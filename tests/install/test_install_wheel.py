"""The Python package serves C and C++: it says where its core is, and programs build against it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from _prefix import LIMIT_S, ROOT, attempt, build_project, environment, linked_libraries, need, run

pytestmark = pytest.mark.timeout(LIMIT_S)

FILES = {
    "--include-dir": "qlora_native/c_api.h",
    "--cmake-dir": "qlora_nativeConfig.cmake",
    "--pkgconfig-dir": "qlora_native.pc",
}
# The command, in a Python that has none of what the command line needs.
WITHOUT_EXTRAS = """
import runpy, sys
for name in ("typer", "rich", "yaml", "transformers", "datasets", "accelerate", "matplotlib"):
    sys.modules[name] = None
sys.argv = ["qlora_native", sys.argv[1]]
runpy.run_module("qlora_native", run_name="__main__")
"""


def folder(option: str) -> Path:
    """Return what `python -m qlora_native` prints, and nothing else."""
    return Path(run(sys.executable, "-m", "qlora_native", option).strip())


@pytest.mark.parametrize("option", FILES)
def test_the_command_prints_a_folder(option):
    assert (folder(option) / FILES[option]).is_file()
    alone = run(sys.executable, "-c", WITHOUT_EXTRAS, option)
    assert Path(alone.strip()) == folder(option)


def test_a_folder_that_is_not_there_is_an_error():
    program = (
        "import qlora_native, sys; qlora_native.__path__[:] = ['/nowhere']\n"
        "from qlora_native.__main__ import main; sys.argv = ['x', '--cmake-dir']; main()"
    )
    # What is imported lazily has to be there before the package forgets where it lies.
    program = "from qlora_native.cli import folders\n" + program
    result = attempt(sys.executable, "-c", program)
    assert result.returncode == 1
    assert "/nowhere" in result.stderr
    assert result.stdout == ""


def test_an_unknown_option_goes_to_the_command_line():
    result = attempt(sys.executable, "-m", "qlora_native", "--cmake-dirs")
    assert result.returncode == 2
    assert result.stdout == ""


def test_a_program_builds_against_the_package(tmp_path):
    need("cmake", "g++")
    example = ROOT / "examples" / "cpp" / "quickstart"
    build_project(example, tmp_path, f"-Dqlora_native_DIR={folder('--cmake-dir')}")
    assert "relative error" in run(tmp_path / "quickstart")
    assert "libqlora_native.so" in linked_libraries(tmp_path / "quickstart")


def test_a_c_program_builds_against_the_package_by_pkg_config(tmp_path):
    need("pkg-config", "gcc")
    at = environment(PKG_CONFIG_PATH=str(folder("--pkgconfig-dir")))
    flags = run("pkg-config", "--cflags", "--libs", "qlora_native", env=at).split()
    libraries = run("pkg-config", "--variable=libdir", "qlora_native", env=at).strip()
    source = ROOT / "examples" / "c" / "quantize.c"
    run("gcc", source, *flags, "-lm", f"-Wl,-rpath,{libraries}", "-o", tmp_path / "quantize")
    assert "relative error" in run(tmp_path / "quantize")
