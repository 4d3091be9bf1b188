"""Every config in configs/ resolves to its golden JSON; `python scripts/write_golden_configs.py` renews them."""

import ast
from pathlib import Path

import pytest

from hsai.config import RunConfig
from hsai.config_file import load_config
from hsai.configuration import difference, from_dict, to_json
from hsai.files import read_json
from scripts.write_golden_configs import GOLDEN, ROOT, find_configs, golden_path

CONFIGS = find_configs()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_its_golden(path: Path) -> None:
    config = load_config(path, CONFIGS[path]).config
    assert to_json(config) == golden_path(path).read_text(), "run scripts/write_golden_configs.py and review the change"
    assert from_dict(CONFIGS[path], read_json(golden_path(path))) == config


def test_no_golden_is_left_over() -> None:
    assert set(GOLDEN.rglob("*.json")) == {golden_path(path) for path in CONFIGS}


def test_fork_changes_one_field_by_one_line() -> None:
    loaded = load_config(ROOT / "configs" / "quickstart_nm24.py", RunConfig)
    assert loaded.parent_name == "quickstart"
    assert [line.split(":")[0] for line in difference(loaded.config, loaded.parent)] == ["train.formats.0"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docstring_gives_the_command(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"configs/{path.relative_to(ROOT / 'configs')}" in docstring
