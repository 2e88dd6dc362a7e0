"""What `make docs` shows besides docs/: README and its neighbours, results/, the examples, the notebook.

Links are written as they work in the repository; here they are turned to where the site has their targets.
"""

from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
#: Where the site has files that lie outside of docs/.
ELSEWHERE = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE",
    "src/foveate/demo/CARD.md": "demo.md",
    "demo-models/src/foveate_demo_models/hd/CARD.md": "demo-hd.md",
    "demo-models/src/foveate_demo_models/video/CARD.md": "demo-video.md",
    "examples/tour.ipynb": "tour.md",
}
_LINK = re.compile(r"(\]\()(?!\w+:|#|<)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and files that lie elsewhere."""
    for name, shown_as in ELSEWHERE.items():
        if not name.endswith(".ipynb"):
            files.append(File.generated(config, shown_as, abs_src_path=str(ROOT / name)))
    for path in sorted((ROOT / "results").glob("*.*")):
        if path.suffix in (".md", ".csv", ".html"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    notebook, pictures = shown(json.loads((ROOT / "examples" / "tour.ipynb").read_text(encoding="utf-8")))
    files.append(File.generated(config, "tour.md", content=notebook))
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    files.append(File.generated(config, "examples.md", content=examples()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to where the site has their targets."""
    uri = page.file.src_uri
    source = next((path for path, shown in ELSEWHERE.items() if shown == uri), None)
    source = source or (uri if uri.startswith("results/") else f"docs/{uri}")

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        return match[1] + posixpath.relpath(_place(target), posixpath.dirname(uri) or ".")

    return _LINK.sub(turned, markdown)


def _place(path: str) -> str:
    """Return where the site has a file of the repository."""
    if path.startswith("examples/") and path.endswith(".py"):
        return f"examples.md#{Path(path).stem}"
    return ELSEWHERE.get(path, path.removeprefix("docs/"))


def examples() -> str:
    """Return the page of the examples: what each is for, and its code."""
    page = ["# Examples\n", "Each is a file of at most 40 lines in `examples/`, and is run by the tests.\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text(encoding="utf-8")
        about = (ast.get_docstring(ast.parse(code)) or "").split("\n")[0]
        page += [f"## {path.stem} {{#{path.stem}}}\n", f"{about}\n", f"```python\n{code}```\n"]
    return "\n".join(page)


def shown(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as a page, and the pictures on it."""
    page, pictures = list[str](), dict[str, bytes]()
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        page.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                name = f"img/tour-{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                page.append(f"![What the cell above shows](../docs/{name})")
            else:
                page.append("```text\n" + "".join(data["text/plain"]).rstrip() + "\n```")
    return "\n\n".join(page) + "\n", pictures
