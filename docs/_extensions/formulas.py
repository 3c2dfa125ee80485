"""Formulas as drawings inside of the page: no script, font or network is needed to read them."""

from __future__ import annotations

import html
from typing import Any

import ziamath
from docutils import nodes
from sphinx.application import Sphinx

# Every glyph is drawn where it stands, without identifiers that other formulas could have too.
ziamath.config.svg2 = False


def draw(latex: str, size: float, inline: bool) -> str:
    """Return a formula as an <svg> of the text's colour, on the text's base line when inline."""
    formula = ziamath.Latex(latex, size=size, color="currentColor", inline=inline)
    shift = f' style="vertical-align: {formula.getyofst():.2f}px"' if inline else ""
    label = html.escape(latex, quote=True)
    return formula.svg().replace("<svg ", f'<svg role="img" aria-label="{label}"{shift} ', 1)


def _visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(draw(node.astext(), 17, inline=True))
    raise nodes.SkipNode


def _visit_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="formula"))
    translator.body.append(draw(node.astext(), 19, inline=False))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer for conf.py's html_math_renderer."""
    app.add_html_math_renderer(
        "formulas", inline_renderers=(_visit_inline, None), block_renderers=(_visit_block, None)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
