"""Which module of the package may import which: the layers, from left to right."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

PACKAGE = "qlora_native"

# A module imports from its own layer and from layers further left. "" is the package itself: its
# public names, which what stands on the library uses like any user.
LAYERS = (
    ("_C", "_files"),
    ("_checks", "_threads"),
    ("_weight",),
    ("_library", "_dense_groups", "_grouped_ops", "_grouped_lora_ops", "_lora_layers", "_lora_ops"),
    ("_eager",),
    ("_autograd", "_grouped_lora", "_lora_autograd"),
    ("_lora_eager",),
    ("functional", "kernels"),
    ("nn", "optim", "memory"),
    ("training",),
    ("checkpoint", "convert", "footprint"),
    ("hf",),
    ("",),
    ("cli",),
    ("__main__",),
)
_ORDER = {module: place for place, layer in enumerate(LAYERS) for module in layer}
ONLY_TORCH_LIBRARY = "_library"


def _top(module: str) -> str:
    return module.split(".")[0]


def _name_of(path: str) -> str:
    """python/qlora_native/nn/linear.py -> nn.linear; python/qlora_native/__init__.py -> ""."""
    parts = path.removesuffix(".py").split("/")
    parts = parts[parts.index(PACKAGE) + 1 :]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.AST, module: str, is_package: bool, known: set[str]) -> Iterator[str]:
    """Yield the modules of the package that a file imports, relative to the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _top(alias.name) == PACKAGE:
                    yield alias.name[len(PACKAGE) + 1 :]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = module.split(".") if is_package else module.split(".")[:-1]
                base = base[: len(base) - (node.level - 1)]
                source = ".".join([PACKAGE, *filter(None, base), *filter(None, [node.module])])
            if _top(source) != PACKAGE:
                continue
            source = source[len(PACKAGE) + 1 :]
            for alias in node.names:
                # "from qlora_native import _checks" names a module, "import quantize_4bit" a value.
                yield alias.name if not source and alias.name in known else source


def violations(texts: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence per import that goes the wrong way, in the files {path: text}."""
    known = set(_ORDER) | {_top(_name_of(path)) for path in texts}
    for path, text in texts.items():
        module = _name_of(path)
        if _top(module) not in _ORDER:
            yield f"{path} belongs to no layer"
            continue
        tree = ast.parse(text)
        for target in _imported(tree, module, path.endswith("__init__.py"), known):
            if _top(target) not in _ORDER:
                yield f"{path} imports {PACKAGE}.{target}, which belongs to no layer"
            elif _ORDER[_top(target)] > _ORDER[_top(module)]:
                yield f"{path} imports {PACKAGE}.{target}".removesuffix(".") + ", a layer above it"
        if module != ONLY_TORCH_LIBRARY and "torch.library" in text:
            yield f"{path} uses torch.library; only {ONLY_TORCH_LIBRARY} does"
