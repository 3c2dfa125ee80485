"""The site builds without a warning, holds every public name, and needs no network to be read."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from _sources import ROOT

INCLUDE = ROOT / "cpp" / "include" / "qlora_native"
MODULES = ("", ".nn", ".optim", ".memory", ".hf", ".kernels")
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the built site."""
    for module in ("breathe", "furo", "myst_parser", "sphinx", "sphinx_design", "ziamath"):
        pytest.importorskip(module)
    if shutil.which("doxygen") is None:
        pytest.skip("doxygen is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "html")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder / "html"


@pytest.fixture(scope="session")
def inventory(site):
    """{name: (domain and role, address)} of what the site describes."""
    from sphinx.util.inventory import InventoryFile

    loaded = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    return {
        item: (role, entry.uri)
        for role, entries in loaded.data.items()
        for item, entry in entries.items()
    }


def _python_names():
    for suffix in MODULES:
        module = importlib.import_module(f"qlora_native{suffix}")
        for name in module.__all__:
            yield f"qlora_native{suffix}.{name}"


def test_every_public_python_name_is_described(inventory):
    names = list(_python_names())
    assert len(names) > 50
    assert [name for name in names if name not in inventory] == []


def functions_of(header: str) -> set[str]:
    """Return the functions that a header's text exports."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", header, flags=re.S)
    return set(re.findall(r"^QN_API\b[^;(]*?\b(\w+)\s*\(", code, re.M))


@pytest.mark.parametrize("path", sorted(INCLUDE.glob("*.h")), ids=lambda path: path.name)
def test_every_header_is_described(site, inventory, path):
    page = site / "_generated" / "headers" / f"{path.stem}.html"
    if path.name in ("export.h", "qlora_native.h"):  # which declare nothing
        assert path.name in (site / "reference" / "cpp" / "index.html").read_text()
        return
    prefix = "" if path.name.startswith("c_api") else "qlora_native::"
    described = {
        name.removeprefix(prefix).partition("(")[0]: uri for name, (_, uri) in inventory.items()
    }
    for function in functions_of(path.read_text()):
        assert described.get(function, "").startswith("_generated/headers/"), function
    assert path.name in page.read_text()
    # Nothing was left out for lack of the marks that Doxygen looks for.
    assert "<dt" in page.read_text()


def test_every_command_and_option_is_described(site):
    typer = pytest.importorskip("typer")
    from qlora_native.cli import app

    page = (site / "_generated" / "command_line.html").read_text()
    text = re.sub(r"<[^>]+>", "", page)
    for name, command in typer.main.get_command(app).commands.items():
        assert f'id="{name}"' in page
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                assert (option if option.startswith("-") else option.upper()) in text


def test_functions_are_found_in_headers():
    header = "QN_API int f(int a);\n// QN_API int g();\nQN_API qn_status\nh(void);\nint i();\n"
    assert functions_of(header) == {"f", "h"}


def foreign_resources(html: str) -> list[str]:
    """Return what a page loads from elsewhere when it is opened."""
    loads = re.findall(r'<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)="([^"]+)"', html)
    return [address for address in loads if re.match(r"(?:https?:)?//", address)]


def test_no_page_loads_anything_from_a_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 35
    assert {page.name: foreign_resources(page.read_text()) for page in pages} == {
        page.name: [] for page in pages
    }


def test_a_foreign_resource_is_found():
    assert foreign_resources('<script async src="https://cdn.example/x.js"></script>')
    assert foreign_resources('<a href="https://example.org">x</a><script src="_static/a.js">') == []


def test_pages_have_formulas_figures_and_a_search(site):
    for page, figure in (
        ("nf4", "nf4"),
        ("double-quantization", "double_quantization"),
        ("paging",) * 2,
    ):
        html = (site / "concepts" / f"{page}.html").read_text()
        assert html.count('<svg role="img" aria-label="') > 5
        assert f"{figure}.svg" in html
        assert (site / "_images" / f"{figure}.svg").stat().st_size > 5000
    index = (site / "searchindex.js").read_text()
    assert "absmax" in index and "qn_quantize_4bit" in index


def test_links_between_pages_lead_somewhere(site):
    broken = []
    for page in site.rglob("*.html"):
        for address in re.findall(r'<a\b[^>]*?\bhref="([^"#?]+)(?:#[^"]*)?"', page.read_text()):
            if not re.match(r"[a-z]+:|//", address) and not (page.parent / address).exists():
                broken.append(f"{page.relative_to(site)}: {address}")
    assert broken == []


def test_docstrings_left_no_marks_behind(site: Path):
    """Marks of a markup that was not understood, in what readers see."""
    pages = [*(site / "reference").rglob("*.html"), *(site / "_generated").rglob("*.html")]
    for page in pages:
        text = re.sub(r"<pre>.*?</pre>|<[^>]+>", "", page.read_text(), flags=re.S)
        assert re.findall(r"``|:(?:class|func|meth):`|@endverbatim|\bArgs:", text) == [], page
