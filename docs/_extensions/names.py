"""Links from a docstring's short names (`quantize_4bit`, `optim.AdamW`) to what they are here."""

from __future__ import annotations

import builtins
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

_OURS = "qlora_native."


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    if node.get("refdomain") != "py" or node.get("reftype") not in ("obj", "class"):
        return None
    target = node["reftarget"].removesuffix("()")
    if hasattr(builtins, target):
        return None
    objects = env.domains.python_domain.objects
    # What is exported in two places is meant as the package exports it.
    found = sorted(
        (n for n in objects if n.endswith(f".{target}") and n.startswith(_OURS)), key=len
    )
    if not found:
        return None
    place = objects[found[0]]
    return make_refnode(
        app.builder, node["refdoc"], place.docname, place.node_id, [content], found[0]
    )


def setup(app: Sphinx) -> dict[str, Any]:
    """Ask here for names that Sphinx itself does not find."""
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
