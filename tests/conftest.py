"""Options of the whole test suite, and which tests share a process when there are several."""

from pathlib import Path

import pytest

# Their tests share what they build.
_ONE_PROCESS = ("docs", "install", "packaging")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        group = path.parts[0] if path.parts[0] in _ONE_PROCESS else str(path)
        item.add_marker(pytest.mark.xdist_group(group))
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs --slow"))
