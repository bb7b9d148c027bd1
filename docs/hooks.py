"""The site's pages of methods: what docs/methods says of each, then its options from conf/method.

A method without a page of its own gets one, so that adding a method means adding no page.
"""

from __future__ import annotations

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


def on_config(config: Any) -> Any:
    """Enter generated pages into the navigation."""
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
