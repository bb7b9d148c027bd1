"""The site's pages of methods: what docs/methods says of each, then its options from conf/method;
and its link to the repository.

A method without a page of its own gets one, so that adding a method means adding no page.
"""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = """

## Options

`conf/method/{name}.yaml`; each key is `method.<key>=` on the command line:

```yaml
--8<-- "conf/method/{name}.yaml"
```

::: {target}
    options:
      heading_level: 2
      members: false
"""


def targets() -> dict[str, str]:
    """Find the class behind each file of conf/method."""
    files = sorted((ROOT / "conf" / "method").glob("*.yaml"))
    return {path.stem: yaml.safe_load(path.read_text())["_target_"] for path in files}


def options(name: str) -> str:
    """Write the part of a method's page that is the same for all: its YAML and its docstring."""
    return OPTIONS.format(name=name, target=targets()[name])


def without_page() -> list[str]:
    """Name the methods that docs/methods says nothing of."""
    return [name for name in targets() if not (ROOT / f"docs/methods/{name}.md").exists()]


def repository() -> str | None:
    """Find the repository's page: of the package's metadata, else where the clone is from."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if "Repository" in (urls := project.get("urls", {})):
        return str(urls["Repository"])
    asked = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return None
    return found.removesuffix(".git") if found.startswith("https://") and "@" not in found else None


def on_config(config: Any) -> Any:
    """Link the repository, and enter generated pages into the navigation."""
    config.repo_url = config.repo_url or repository()
    config.repo_name = config.repo_name or "Repository"
    (methods,) = (entry["Methods"] for entry in config.nav if "Methods" in entry)
    methods += [{name: f"methods/{name}.md"} for name in without_page()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each method that has none."""
    from mkdocs.structure.files import File

    for name in without_page():
        run = f"**Run**: `python runners/sweep.py method={name} sparsity=0.5`"
        page = f"methods/{name}.md"
        files.append(File.generated(config, page, content=f"# {name}\n\n{run}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put a method's options at the end of its page."""
    folder, _, name = page.file.src_uri.removesuffix(".md").rpartition("/")
    return markdown + options(name) if folder == "methods" and name in targets() else markdown
