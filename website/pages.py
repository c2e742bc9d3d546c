"""Pages of the site that docs/ does not have: files of the root, notebooks, the API, linked code.

A hook of mkdocs. Links that leave docs/ lead to these pages, so that the site is whole without a repository.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
# Files of the repository that are pages of the site, under another name.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "nested_learning/ops/delta_rule/README.md": "delta-rule.md",
    **{f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in ROOT.glob("notebooks/*.ipynb")},
}
# Packages with a page of their own, in the order of the site: (package, title).
PACKAGES = (
    ("nested_learning.models", "Models"),
    ("nested_learning.layers", "Layers"),
    ("nested_learning.memory", "Memories"),
    ("nested_learning.ops", "Operators"),
    ("nested_learning.optimizers", "Optimizers"),
    ("nested_learning.levels", "Levels"),
    ("nested_learning.continual", "Continual learning"),
    ("nested_learning.lens", "Lens"),
    ("nested_learning.training.data", "Data"),
    ("nested_learning.evals", "Evaluations"),
)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)(?P<path>[^)\s#]+)(?:#(?P<anchor>[^)\s]+))?(?=\))")
LINE = re.compile(r"L(\d+)")
TO_LINE = re.compile(r'(?P<link>href="[^"#]*source/[^"#]*)(?P<title>" title="[^"]*, line (?P<line>\d+)")')


def public_names(package: str) -> list[str]:
    """The names in `__all__` of a package, without importing it."""
    tree = ast.parse((ROOT / Path(*package.split(".")) / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{package} has no __all__")


def api_page(package: str, title: str) -> str:
    """Markdown of a package's page: its docstring, then each public class and function."""
    names = [name for name in public_names(package) if not name.startswith("__")]
    head = f"::: {package}\n    options: {{members: false, show_root_heading: false, heading_level: 2}}\n"
    return f"# {title}\n\n`{package}`\n\n{head}\n" + "\n".join(f"::: {package}.{name}\n" for name in names)


def fenced(language: str, text: str) -> str:
    """A block of code, in a fence that nothing in it closes."""
    fence = "`" * max([3, *(1 + len(run) for run in re.findall(r"`{3,}", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def source_page(path: str) -> str:
    """Markdown of a file of the repository, with an anchor at each line."""
    language = LANGUAGES.get(Path(path).suffix, "text")
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"# {path}\n\n" + fenced(f'{language} linenums="1"', text)


def notebook_page(path: str) -> str:
    """Markdown of a notebook of the repository, with what its file keeps of outputs: text and pictures."""
    parts = []
    for cell in json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text + "\n" if cell["cell_type"] == "markdown" else fenced("python", text))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="plot" src="data:image/png;base64,{picture}">\n')
            else:
                parts.append(fenced("text", "".join(output.get("text", data.get("text/plain", "")))))
    return "\n".join(parts)


def page_text(path: str) -> str:
    """Markdown of the page that a file of the repository is."""
    if path.endswith(".ipynb"):
        return notebook_page(path)
    return (ROOT / path).read_text(encoding="utf-8")


def linked_files(folder: str, text: str) -> list[str]:
    """Files of the repository, beside its pages, that the Markdown of a page in `folder` links to."""
    found = []
    for match in LINK.finditer(text):
        path = posixpath.normpath(posixpath.join(folder, match["path"]))
        if path not in PAGES and not path.startswith(("docs/", "..")) and (ROOT / path).is_file():
            found.append(path)
    return found


def relinked(page: str, folder: str, text: str) -> str:
    """The Markdown of the site's `page`, whose links are written for a file in `folder` of the repository."""

    def new(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match["path"]))
        anchor = match["anchor"]
        if path in PAGES:
            target = PAGES[path]
        elif path.startswith("docs/"):
            target = path.removeprefix("docs/")
        elif (ROOT / path).is_file():
            line = LINE.fullmatch(anchor or "")
            title = f' "{path}, line {line[1]}"' if line else ""
            return posixpath.relpath(f"source/{path}.md", posixpath.dirname(page) or ".") + title
        else:
            return match[0]  # mkdocs says that it leads nowhere
        way = posixpath.relpath(target, posixpath.dirname(page) or ".")
        return f"{way}#{anchor}" if anchor else way

    return LINK.sub(new, text)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    from mkdocs.structure.files import File  # the rest of this file is tested without mkdocs

    texts = {
        f"docs/{file.src_uri}": page_text(f"docs/{file.src_uri}") for file in files.documentation_pages()
    }
    texts |= {path: page_text(path) for path in PAGES}
    linked = {name for path, text in texts.items() for name in linked_files(posixpath.dirname(path), text)}
    for path, name in PAGES.items():
        files.append(File.generated(config, name, content=texts[path]))
    for path in sorted(linked):
        files.append(File.generated(config, f"source/{path}.md", content=source_page(path)))
    for package, title in PACKAGES:
        name = f"api/{package.removeprefix('nested_learning.').replace('.', '-')}.md"
        files.append(File.generated(config, name, content=api_page(package, title)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of pages that stand elsewhere in the repository."""
    uri = page.file.src_uri
    if uri.startswith(("source/", "api/")):
        return markdown
    back = {name: path for path, name in PAGES.items()}
    folder = posixpath.dirname(back[uri]) if uri in back else posixpath.join("docs", posixpath.dirname(uri))
    return relinked(uri, folder, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Links to lines of code: mkdocs knows no anchors inside a block of code, and would call them missing."""
    return TO_LINE.sub(r"\g<link>#__codelineno-0-\g<line>\g<title>", output)
