"""Changes manifests as their writer could have: what is wrong then is not only that they were altered."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hsai.export.manifest import digest


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Applies `change` to the content of a manifest.json, and signs it again."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content | {"sha256": digest(content)}))
