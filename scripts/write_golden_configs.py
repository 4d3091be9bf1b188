"""Writes tests/configs/golden/<name>.json, the resolved form of every experiment in configs/.

    python scripts/write_golden_configs.py

A change in a parent then shows in review as a change of every config that inherits it.
"""

from pathlib import Path

from hsai.compress import RecipeConfig
from hsai.config import RunConfig
from hsai.config_file import load_config
from hsai.configuration import to_json

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "configs" / "golden"


def find_configs() -> dict[Path, type]:
    """Each config file of the repository, and what its get_config() gives."""
    runs = {path: RunConfig for path in (ROOT / "configs").glob("*.py") if "def get_config" in path.read_text()}
    recipes = {path: RecipeConfig for path in (ROOT / "configs" / "compress").glob("*.py")}
    return runs | recipes


def golden_path(config: Path) -> Path:
    """Where the resolved form of a config file is kept."""
    return (GOLDEN / config.relative_to(ROOT / "configs")).with_suffix(".json")


def main() -> None:
    """Writes them all."""
    for path, kind in find_configs().items():
        target = golden_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(to_json(load_config(path, kind).config))
        print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
