"""The examples in C, C++ and Rust build against an installed core in empty folders, and agree."""

from __future__ import annotations

import re
import shutil

import pytest

from _prefix import (
    LIBRARIES,
    LIMIT_S,
    ROOT,
    build_project,
    environment,
    linked_libraries,
    need,
    run,
)

pytestmark = pytest.mark.timeout(LIMIT_S)


def copied(example: str, folder):
    """Copy an example to an empty folder, as a user who has nothing else of the project."""
    return shutil.copytree(
        ROOT / "examples" / example,
        folder / "source",
        ignore=shutil.ignore_patterns("target", "Cargo.lock"),
    )


def error_of(output: str) -> float:
    found = re.search(r"relative error of the product: ([\d.]+)$", output, re.MULTILINE)
    assert found, output
    return float(found[1])


def expected_error() -> float:
    """The error of NF4 for numbers that are uniform in [-1, 1), in blocks of 64, by numpy."""
    np = pytest.importorskip("numpy")
    values = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
    values += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    rng = np.random.default_rng(0)
    w = rng.uniform(-1, 1, (256, 512))
    x = rng.uniform(-1, 1, (4, 512))
    blocks = w.reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.abs((blocks / absmax)[..., None] - np.array(values)).argmin(axis=-1)
    decoded = (np.array(values)[codes] * absmax).reshape(w.shape)
    return float(np.linalg.norm(x @ (decoded - w).T) / np.linalg.norm(x @ w.T))


@pytest.mark.parametrize("library", LIBRARIES)
def test_c(prefix, tmp_path, library):
    need("gcc", "cmake")
    source = copied("c", tmp_path)
    listing = source / "CMakeLists.txt"
    text = listing.read_text()
    assert "find_package(qlora_native REQUIRED)" in text
    listing.write_text(text.replace("REQUIRED)", f"REQUIRED COMPONENTS {library})"))
    build_project(source, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    quantize = tmp_path / "build" / "quantize"
    assert ("qlora_native" in linked_libraries(quantize)) == (library == "shared")
    assert error_of(run(quantize)) == pytest.approx(expected_error(), rel=0.1)
    losses = re.findall(r"steps: (\S+)$", run(tmp_path / "build" / "paged_optimizer"), re.MULTILINE)
    assert float(losses[0]) > 0.2
    assert float(losses[-1]) < 1e-4


@pytest.mark.parametrize("library", LIBRARIES)
def test_cpp(prefix, tmp_path, library):
    need("g++", "cmake")
    source = copied("cpp/quickstart", tmp_path)
    listing = source / "CMakeLists.txt"
    text = listing.read_text()
    assert "find_package(qlora_native REQUIRED)" in text
    listing.write_text(text.replace("REQUIRED)", f"REQUIRED COMPONENTS {library})"))
    build_project(source, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    quickstart = tmp_path / "build" / "quickstart"
    assert ("qlora_native" in linked_libraries(quickstart)) == (library == "shared")
    assert error_of(run(quickstart)) == pytest.approx(expected_error(), rel=0.1)


def test_rust_and_c_print_the_same(prefix, tmp_path):
    need("cargo", "gcc", "pkg-config")
    pkg_config = environment(PKG_CONFIG_PATH=str(prefix / "lib" / "pkgconfig"))
    source = copied("rust", tmp_path)
    rust = run(
        *("cargo", "run", "--quiet", "--offline", "--release"),
        *("--manifest-path", source / "Cargo.toml", "--target-dir", tmp_path / "target"),
        env=pkg_config,
    )
    flags = run("pkg-config", "--cflags", "--libs", "qlora_native", env=pkg_config).split()
    program = tmp_path / "quantize"
    run(
        *("gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", ROOT / "examples/c/quantize.c", *flags),
        *("-lm", f"-Wl,-rpath,{prefix / 'lib'}", "-o", program),
    )
    assert rust == run(program)
    assert error_of(rust) == pytest.approx(expected_error(), rel=0.1)
