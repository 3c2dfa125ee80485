#!/usr/bin/env python3
"""Build and test on the GPU of this machine, without a network; write bench/results/<gpu>.json.

Uses the Python that runs it (torch, nanobind, pytest), cmake, and nvcc. Environment:

    QLORA_NATIVE_CORE         prefix of an installed core: then only the bindings are built
    QLORA_NATIVE_TEST_BINARY  built C++ tests (several: separated by ":"), for want of GoogleTest
    QLORA_NATIVE_COMMIT       the commit to record where the sources came without their history

Logs are build/gpu/*.log, the package is build/gpu/prefix (put it on PYTHONPATH to use it).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from gpu_support import (
    OUT,
    PACKAGE,
    PREFIX,
    ROOT,
    Counts,
    Gpu,
    StepFailedError,
    StepSkippedError,
    cuda_home,
    find_gpu,
    package_env,
    run,
    tail,
    tool,
)

GTEST_HINT = "apt-get install libgtest-dev   (or name a built test in QLORA_NATIVE_TEST_BINARY)"
SANITIZERS = ("memcheck", "racecheck")
# Each C++ test runs on every device; these do in seconds what a sanitizer makes minutes of.
SMALL_CASES = (
    "Quantize.*:Dequantize.*:DoubleQuantize.*:*Matmul*:*/Memory.BytesSurvive*"
    ":-*Split*:*MoreGroups*:*MoreRows*"
)


class Session:
    """The steps, over the options and what was found on the machine."""

    def __init__(self, options: argparse.Namespace, gpu: Gpu) -> None:
        self.options = options
        self.gpu = gpu
        self.tests: dict[str, dict[str, int]] = {}
        core = os.environ.get("QLORA_NATIVE_CORE")
        self.core = Path(core).resolve() if core else None

    def log(self, step: str) -> Path:
        """Return the log file of a step."""
        return OUT / f"{step}.log"

    def build(self) -> str:
        """Configure, compile and install; put the Python files next to the extension."""
        for module in ("nanobind", "pytest"):
            if importlib.util.find_spec(module) is None:
                raise StepFailedError(f"{sys.executable} has no module {module}")
        log, tree = self.log("build"), OUT / "tree"
        shutil.rmtree(PREFIX, ignore_errors=True)
        cmake = tool("cmake")
        configure = [cmake, "-S", ROOT, "-B", tree, *self._configure_options()]
        for command in (
            configure,
            [cmake, "--build", tree, "--parallel", str(self.options.jobs)],
            [cmake, "--install", tree],
        ):
            if run(log, command):
                raise StepFailedError(f"{' '.join(map(str, command[:3]))} failed")
        shutil.copytree(
            ROOT / "python" / "qlora_native",
            PACKAGE,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__", "_C.*.so", "_C.so", "lib"),
        )
        return self._check_import(log)

    def _configure_options(self) -> list[str]:
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={PACKAGE}",
            "-DCMAKE_INSTALL_LIBDIR=lib",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DQLORA_NATIVE_BUILD_BINDINGS=ON",
            f"-DQLORA_NATIVE_BUILD_TESTS={'ON' if self._builds_cpp_tests() else 'OFF'}",
        ]
        if shutil.which("ninja"):
            options += ["-G", "Ninja"]
        if self.core is not None:
            if not (self.core / "lib" / "cmake" / "qlora_native").is_dir():
                raise StepFailedError(f"QLORA_NATIVE_CORE={self.core} holds no installed core")
            return [
                *options,
                "-DQLORA_NATIVE_USE_INSTALLED_CORE=ON",
                f"-DCMAKE_PREFIX_PATH={self.core}",
            ]
        nvcc = tool("nvcc", cuda_home() / "bin")
        return [
            *options,
            "-DQLORA_NATIVE_USE_INSTALLED_CORE=OFF",
            "-DQLORA_NATIVE_CUDA=ON",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DQLORA_NATIVE_CUDA_ARCHITECTURES={self.gpu.capability}-real",
        ]

    def _builds_cpp_tests(self) -> bool:
        if self.options.skip_cpp_tests or os.environ.get("QLORA_NATIVE_TEST_BINARY"):
            return False
        probe = OUT / "probe"
        probe.mkdir(parents=True, exist_ok=True)
        (probe / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.25)\nproject(probe LANGUAGES CXX)\n"
            "find_package(GTest REQUIRED)\n"
        )
        return run(self.log("probe"), [tool("cmake"), "-S", probe, "-B", probe / "tree"]) == 0

    def _check_import(self, log: Path) -> str:
        program = (
            "import qlora_native as qn, sys\n"
            "reason = qn.cuda_unavailable_reason()\n"
            "sys.exit(reason) if reason else print(qn.__file__)\n"
        )
        found = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=package_env(),
            cwd=OUT,
            check=False,
        )
        with log.open("a") as sink:
            sink.write(found.stdout + found.stderr)
        if found.returncode:
            raise StepFailedError(f"the built package does not see the GPU: {found.stderr.strip()}")
        where = Path(found.stdout.strip()).resolve().parent
        if where != PACKAGE.resolve():
            raise StepFailedError(f"another qlora_native is imported first, from {where}")
        return (
            f"core from {self.core}"
            if self.core
            else f"core and kernels for sm_{self.gpu.capability}"
        )

    def python_tests(self) -> str:
        """Run the Python tests marked gpu."""
        results = OUT / "pytest.xml"
        results.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", f"--junitxml={results}"]
        if self.options.slow:
            command.append("--slow")
        status = run(
            self.log("python-tests"), [*command, "tests/python", "tests/bench"], package_env()
        )
        if not results.is_file():
            raise StepFailedError(f"pytest ended with status {status} and left no results")
        suite = ElementTree.parse(results).getroot().find("testsuite")
        failed = int(suite.get("failures")) + int(suite.get("errors"))
        skipped = int(suite.get("skipped"))
        counts = Counts(int(suite.get("tests")) - failed - skipped, failed, skipped)
        self.tests["python"] = dataclasses.asdict(counts)
        counts.require_success("pytest")
        return str(counts)

    def _test_binaries(self) -> list[Path]:
        named = os.environ.get("QLORA_NATIVE_TEST_BINARY")
        if named:
            binaries = [Path(part).resolve() for part in named.split(os.pathsep)]
        else:
            listed = subprocess.run(
                [tool("ctest"), "--test-dir", OUT / "tree", "--show-only=json-v1"],
                capture_output=True,
                text=True,
                check=False,
            )
            tests = json.loads(listed.stdout)["tests"] if listed.returncode == 0 else []
            commands = [Path(test["command"][0]) for test in tests if test.get("command")]
            binaries = [path for path in dict.fromkeys(commands) if OUT in path.parents]
        if not binaries:
            raise StepSkippedError(f"there is no GoogleTest to build them with: {GTEST_HINT}")
        missing = [str(path) for path in binaries if not path.is_file()]
        if missing:
            raise StepFailedError(f"there is no test binary {', '.join(missing)}")
        return binaries

    def _cpp_env(self) -> dict[str, str]:
        folders = [str(self.core / "lib")] if self.core else []
        folders += [str(PACKAGE / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        env = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders))}
        env["QLORA_NATIVE_REQUIRE_CUDA"] = "1"
        if self.options.slow:
            env["QLORA_NATIVE_SLOW_TESTS"] = "1"
        return env

    def cpp_tests(self) -> str:
        """Run the C++ tests; each runs its cases on the CPU and on the GPU."""
        total, status = Counts(), 0
        for number, binary in enumerate(self._test_binaries()):
            results = OUT / f"gtest-{number}.json"
            results.unlink(missing_ok=True)
            selected = f"--gtest_filter={self.options.gtest_filter}"
            command = [binary, selected, f"--gtest_output=json:{results}"]
            status |= run(self.log("cpp-tests"), command, self._cpp_env())
            if not results.is_file():
                raise StepFailedError(f"{binary.name} left no results: it crashed or did not start")
            self._count(json.loads(results.read_text()), total)
        self.tests["cpp"] = dataclasses.asdict(total)
        total.require_success("C++ tests")
        if status:
            raise StepFailedError(f"a test binary ended with a bad status ({total})")
        return str(total)

    @staticmethod
    def _count(report: dict, total: Counts) -> None:
        for suite in report["testsuites"]:
            for test in suite["testsuite"]:
                if test.get("failures"):
                    total.failed += 1
                elif test.get("result") == "SKIPPED":
                    total.skipped += 1
                elif test.get("status") == "RUN":
                    total.passed += 1

    def sanitizer(self) -> str:
        """Run the small C++ cases under compute-sanitizer."""
        program = tool("compute-sanitizer", cuda_home() / "bin")
        for checker in SANITIZERS:
            for number, binary in enumerate(self._test_binaries()):
                log = self.log(f"sanitizer-{checker}-{number}")
                checked = [program, "--tool", checker, "--error-exitcode", "99", binary]
                selected = f"--gtest_filter={self.options.sanitizer_filter}"
                status = run(log, [*checked, selected], self._cpp_env())
                text = log.read_text(errors="replace")
                if "Device not supported" in text:
                    raise StepSkippedError("compute-sanitizer does not support this device here")
                if "[       OK ]" not in text:
                    raise StepFailedError(
                        f"{checker}: no test of {binary.name} ran, see {log.name}"
                    )
                if status:
                    raise StepFailedError(f"{checker}: {binary.name} ended with status {status}")
        return f"{' and '.join(SANITIZERS)} clean"

    def bench(self) -> str:
        """Measure, and write the report with the counts of the tests in it."""
        measured = OUT / "bench.json"
        measured.unlink(missing_ok=True)
        command = [
            sys.executable,
            "bench/python/peers.py",
            "--device",
            "cuda",
            "--json",
            measured,
        ]
        if not self.options.full_bench:
            command.append("--quick")
        if run(self.log("bench"), command, package_env()) or not measured.is_file():
            raise StepFailedError("bench/python/peers.py failed")
        report = {**json.loads(measured.read_text())}
        records = report.pop("records")
        target = ROOT / "bench" / "results" / f"{self.gpu.slug}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            json.dumps({**report, "tests": self.tests, "records": records}, indent=1) + "\n"
        )
        note = f"{len(records)} records in {target.relative_to(ROOT)}"
        has_plots = importlib.util.find_spec("matplotlib") is not None
        render = [sys.executable, "bench/render.py", *([] if has_plots else ["--no-plots"])]
        if run(self.log("bench-render"), render):
            raise StepFailedError(f"{note}, but bench/render.py failed")
        return note if has_plots else f"{note}; for want of matplotlib the plot is as it was"


def run_step(session: Session, name: str, step: Callable[[], str]) -> tuple[str, str]:
    """Run one step; return its outcome ("ok", "skipped", "FAILED") and a sentence."""
    print(f"{name} ...", flush=True)
    begin = time.monotonic()
    try:
        outcome, note = "ok", step()
    except StepSkippedError as reason:
        outcome, note = "skipped", str(reason)
    except (StepFailedError, OSError, subprocess.TimeoutExpired) as error:
        outcome, note = "FAILED", str(error)
        for log in sorted(OUT.glob(f"{name}*.log")):
            print(f"  the end of {log.relative_to(ROOT)}:\n{tail(log)}")
    return outcome, f"{note}  [{time.monotonic() - begin:.0f} s]"


def parse_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skip-build", action="store_true", help="use what was built last time")
    parser.add_argument("--skip-python-tests", action="store_true")
    parser.add_argument("--skip-cpp-tests", action="store_true")
    parser.add_argument("--skip-bench", action="store_true")
    parser.add_argument("--full-bench", action="store_true", help="every shape, more rounds")
    parser.add_argument("--slow", action="store_true", help="also the tests marked slow")
    parser.add_argument("--sanitizer", action="store_true", help="compute-sanitizer, small cases")
    parser.add_argument("--gtest-filter", default="*", metavar="FILTER")
    parser.add_argument("--sanitizer-filter", default=SMALL_CASES, metavar="FILTER")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def main() -> int:
    """Run every step that was not switched off, whatever the others did, and sum up."""
    options = parse_arguments()
    try:
        gpu = find_gpu()
    except StepFailedError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    for log in OUT.glob("*.log"):
        log.unlink()
    session = Session(options, gpu)
    steps = [
        ("build", session.build, not options.skip_build),
        ("python-tests", session.python_tests, not options.skip_python_tests),
        ("cpp-tests", session.cpp_tests, not options.skip_cpp_tests),
        ("sanitizer", session.sanitizer, options.sanitizer),
        ("bench", session.bench, not options.skip_bench),
    ]
    outcomes: list[tuple[str, str, str]] = []
    for name, step, wanted in steps:
        if not wanted:
            continue
        outcomes.append((name, *run_step(session, name, step)))
        if name == "build" and outcomes[-1][1] == "FAILED":
            break
    print(f"\n{gpu.name} (sm_{gpu.capability}), {sys.executable}")
    for name, outcome, note in outcomes:
        print(f"  {name:<13} {outcome:<8} {note}")
    return 1 if any(outcome == "FAILED" for _, outcome, _ in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
