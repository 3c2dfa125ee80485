"""The core, installed into a prefix that was moved since: what a program that links it finds."""

import pytest

from _prefix import build_core, run


@pytest.fixture(scope="session")
def core():
    """Return the build folder of a core for the CPU, with both libraries."""
    return build_core()


@pytest.fixture(scope="session")
def prefix(core, tmp_path_factory):
    """Return a prefix that is not where the core was installed to."""
    folder = tmp_path_factory.mktemp("install")
    run("cmake", "--install", core, "--prefix", folder / "original")
    return (folder / "original").rename(folder / "moved")
