"""Make the pages of the site that have their source elsewhere, and check its links.

MkDocs calls the functions named on_...: README becomes the start page, REPRODUCTION.md, the
notebooks, the examples and the docstrings a page each. `mkdocs build` fails on a broken link.
"""

from __future__ import annotations

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = "ddpm_jax"
EXAMPLES = (
    "sampler_on_one_screen.py",
    "own_network.py",
    "own_data.py",
    "fid_by_steps.py",
    "compare_students.py",
)
# What a page of the repository is called here.
PAGES = {
    "README.md": "index.md",
    "REPRODUCTION.md": "reproduction.md",
    "LICENSE": "license.md",
    "examples": "examples.md",
} | {f"examples/{name}": "examples.md" for name in EXAMPLES}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace the API's place in the navigation by its pages."""
    for entry in config.nav:
        if "API" in entry:
            entry["API"] = [{"The public face": "api/index.md"}]
            entry["API"] += [{name: f"api/{name}.md"} for name in _api_modules()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    pages = {
        "index.md": _relink((ROOT / "README.md").read_text(), ""),
        "reproduction.md": _relink((ROOT / "REPRODUCTION.md").read_text(), ""),
        "license.md": f"# License\n\n```text\n{(ROOT / 'LICENSE').read_text()}```\n",
        "examples.md": _examples(),
        "api/index.md": _face(),
    }
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        pages[f"notebooks/{path.stem}.md"] = _notebook(path)
    for name, modules in _api_modules().items():
        pages[f"api/{name}.md"] = _api(*modules)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn formulas, $$ ... $$, into MathML, which needs no script and no network."""
    if (ROOT / "docs" / page.file.src_uri).is_file():  # its links are those of the repository
        markdown = _relink(markdown, "docs")

    def formula(match: re.Match[str]) -> str:
        sized = re.sub(r"\\big[lr]\b", "", match[1])  # MathML sizes its brackets by itself
        return convert(" ".join(sized.split()), display="block")

    return re.sub(r"\$\$(.+?)\$\$", formula, markdown, flags=re.DOTALL)


def on_post_build(config: MkDocsConfig) -> None:
    """Check that whatever a page links to or shows is there, anchors included."""
    site = Path(config.site_dir).resolve()
    pages = {path: _Links(path) for path in sorted(site.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin with the address of the site
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            there = target.is_file()
            if there and parts.fragment and target in pages:
                there = unquote(parts.fragment) in pages[target].anchors
            if not there:
                broken.append(f"{path.relative_to(site)}: {link}")
    if broken:
        raise PluginError("links that lead nowhere:\n" + "\n".join(broken))


class _Links(HTMLParser):
    """The links and anchors of a page of the site."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors = {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for name in ("href", "src") if values.get(name)]


def _relink(text: str, folder: str) -> str:
    """Let links of a page in `folder` of the repository lead to pages of the site."""

    def new(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        path, hash_, anchor = link.partition("#")
        if not path or "://" in path or path.startswith("data:"):
            return match[0]
        target = (ROOT / folder / path).resolve().relative_to(ROOT).as_posix()
        here = PAGES.get(target, target.removeprefix("docs/"))
        if here.startswith("notebooks/"):
            here = here.removesuffix(".ipynb").removesuffix(".py").removesuffix(".md") + ".md"
        up = "../" if folder not in ("", "docs") else ""  # the site is docs/, with pages added
        return f"{before}{up}{here}{hash_}{anchor}{after}"

    text = re.sub(r"(\]\()([^)\s]+)(\))", new, text)
    return re.sub(r'(\bsrc=")([^"]+)(")', new, text)


def _notebook(path: Path) -> str:
    """Write an executed notebook as Markdown, its pictures within."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_relink(source, "notebooks"))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                text = "".join(output["text"]).rstrip()
                parts.append(f"```text\n{text}\n```")
            elif "image/png" in output.get("data", {}):
                data = "".join(output["data"]["image/png"]).replace("\n", "")
                parts.append(f'<img alt="output" src="data:image/png;base64,{data}">')
    return "\n\n".join(parts) + "\n"


def _examples() -> str:
    """Show the examples, each under its name."""
    parts = ["# Examples"]
    for name in EXAMPLES:
        parts.append(f"## {name}\n\n```python\n{(ROOT / 'examples' / name).read_text()}```")
    return "\n\n".join(parts) + "\n"


def _face() -> str:
    """List what `import ddpm_jax as ddpm` offers."""
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_MODULES"
    )
    head = "# The public face\n\n```python\nimport ddpm_jax as ddpm\n```\n\n"
    rows = [f"- [`ddpm.{name}`][{module}.{name}]" for name, module in names.items()]
    return head + "\n".join(rows) + "\n"


def _api(first: str, *others: str) -> str:
    """Write the page of an entry of the package: its head, and its modules below."""
    head = f"::: {first}\n    options:\n      heading_level: 1\n\n"
    return head + "".join(f"::: {module}\n\n" for module in others)


def _api_modules() -> dict[str, list[str]]:
    """Return the modules by the first part of their name, in alphabetical order."""
    modules: dict[str, list[str]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1].startswith("__") or "shipped" in parts or parts[-1] == "__main__":
            continue
        modules.setdefault(parts[1], []).append(".".join(parts).removesuffix(".__init__"))
    return modules
