"""What `make test-matrix` runs is what pyproject.toml declares."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from _sources import read_texts

tomllib = pytest.importorskip("tomllib")


def declared(text):
    """{library: its specifier} of the extra "hf"."""
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    requirements = map(Requirement, extras["hf"])
    return {requirement.name: requirement.specifier for requirement in requirements}


def sets(makefile):
    """[{library: version}] of the matrix."""
    rows = re.search(r"^MATRIX \?=((?:.*\\\n)*.*)", makefile, re.M).group(1)
    return [
        {name: Version(version) for name, _, version in (one.partition("==") for one in row)}
        for row in (row.split(",") for row in re.findall(r"\S+==\S+", rows))
    ]


def problems(makefile, pyproject):
    rows = sets(makefile)
    for library in ("transformers", "peft", "accelerate"):
        specifier = declared(pyproject)[library]
        versions = [row[library] for row in rows]
        oldest = Version(next(one.version for one in specifier if one.operator == ">="))
        if min(versions) != oldest:
            yield f"{library} {min(versions)} is the oldest that is tested, {oldest} is declared"
        yield from (f"{library} {v} is not declared" for v in versions if v not in specifier)


def test_the_oldest_declared_versions_are_in_the_matrix():
    texts = read_texts()
    assert len(sets(texts["Makefile"])) >= 2
    assert not list(problems(texts["Makefile"], texts["pyproject.toml"]))


def test_a_bound_that_nobody_tests_is_found():
    texts = read_texts()
    other = texts["pyproject.toml"].replace('"peft>=0.21,<0.22"', '"peft>=0.20,<0.22"')
    assert list(problems(texts["Makefile"], other)) == [
        "peft 0.21.0 is the oldest that is tested, 0.20 is declared"
    ]
    newer = texts["Makefile"].replace("accelerate==1.10.0", "accelerate==1.9.0")
    assert "accelerate 1.9.0 is not declared" in list(problems(newer, texts["pyproject.toml"]))
