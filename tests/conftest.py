"""Options of the whole test suite, what needs a GPU, and which tests share a process."""

import os
from pathlib import Path

import pytest

# Processes of several tests share the cores: OpenMP threads that spin while they wait take them
# from those that have work. Read when torch is loaded, also by processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Their tests share what they build.
_ONE_PROCESS = ("docs", "install", "packaging")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        group = path.parts[0] if path.parts[0] in _ONE_PROCESS else str(path)
        item.add_marker(pytest.mark.xdist_group(group))
    on_gpu = [item for item in items if "gpu" in item.keywords]
    if on_gpu and (reason := _why_no_gpu()):
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs --slow"))


def _why_no_gpu():
    """Asked only where a test needs one: some of the suite needs neither torch nor a build."""
    import torch

    import qlora_native as qn

    return qn.cuda_unavailable_reason() or (
        "" if torch.cuda.is_available() else "torch sees no CUDA device"
    )
