"""The layers of the package, bottom to top, and README's map of them: `python -m tests.support.layers` prints it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "ddpm_jax"

# A module imports its own folder and rows that stand above its own here. Neighbours in a row never import each other.
LAYERS = (
    ("errors", "files", "machine", "progress"),
    ("diffusion",),
    ("config",),
    ("network",),
    ("build",),
    ("images", "parallel"),
    ("data", "runs", "weights"),
    ("sampling",),
    ("training",),
    ("trained",),
    ("evaluation",),
    ("ahead", "benchmark", "coding", "distillation", "figures", "model", "reproduction"),
    ("cli",),
)
LEVEL = {name: number for number, row in enumerate(LAYERS) for name in row}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def modules() -> Iterator[tuple[str, str, Path]]:
    """(dotted name, first part below the package, path) of each file but the package's own face."""
    for path in sources(PACKAGE):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 2 or not parts[1].startswith("__"):
            yield ".".join(parts).removesuffix(".__init__"), parts[1], path


def imports(path: Path) -> list[tuple[str, bool]]:
    """(name, whether it runs whenever the file is imported) of each import; `from a import b` counts as a.b."""
    found = []

    def visit(node: ast.AST, always: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, always) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path.relative_to(ROOT)}: relative import; write ddpm_jax.<module>"
            )
            found.extend((f"{node.module}.{alias.name}", always) for alias in node.names)
        always = always and not isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Try)
        )
        for child in ast.iter_child_nodes(node):
            visit(child, always)

    visit(ast.parse(path.read_text()), True)
    return found


def layer_map() -> str:
    """The map as README shows it: a row a layer, top to bottom, each entry with the first line of its docstring."""
    lines = []
    for row in reversed(LAYERS):
        for name in row:
            folder = ROOT / PACKAGE / name
            path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
            first, *_ = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
            lines.append(f"{name + '/' if folder.is_dir() else name + '.py':<14} {first}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(layer_map())
