"""Config files load from any directory, forks find their parent, and a broken file is blamed with its line."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsai.config_file import Loaded, load_config
from hsai.configuration import difference
from hsai.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    steps: int = 10
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps={self.steps} must be positive")


BASE = "from config_of_the_test import Run\n\ndef get_config():\n    return Run(name='base')\n"
FORK = """\
import dataclasses
from configs import base

def get_config():
    return dataclasses.replace(base.get_config(), steps=20)
"""


@pytest.fixture(autouse=True)
def this_module_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "config_of_the_test", sys.modules[__name__])


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "base.py").write_text(BASE)
    (folder / "fork.py").write_text(FORK)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    path, modules, bytecode = list(sys.path), set(sys.modules), sys.dont_write_bytecode
    yield
    assert (sys.path, sys.dont_write_bytecode) == (path, bytecode)
    assert {name for name in set(sys.modules) ^ modules if name.partition(".")[0] in ("configs", "json")} == set()
    assert "hsai_config_file" not in sys.modules


def test_a_file_that_exits_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "leaves.py"
    file.write_text("import sys\n\nsys.exit(3)\n")
    with pytest.raises(InputError, match="leaves.py line 3: SystemExit: 3"):
        load_config(file, Run)


def test_a_config_without_a_parent(configs: Path) -> None:
    assert load_config(configs / "base.py", Run) == Loaded(config=Run(name="base"))


@pytest.mark.parametrize("where", [".", "configs", "elsewhere"])
def test_a_fork_finds_its_parent_from_any_directory(configs: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    (configs.parent / "elsewhere").mkdir()
    monkeypatch.chdir(configs.parent / where)
    loaded = load_config(os.path.relpath(configs / "fork.py"), Run)
    assert loaded == Loaded(config=Run(name="base", steps=20), parent=Run(name="base"), parent_name="base")
    assert difference(loaded.config, loaded.parent) == ["steps: 10 -> 20"]


def test_two_checkouts_do_not_mix_and_edits_are_seen(configs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "configs"
    other.mkdir(parents=True)
    (other / "base.py").write_text(BASE.replace("base", "other"))
    (other / "fork.py").write_text(FORK)
    assert load_config(configs / "fork.py", Run).config.name == "base"
    assert load_config(other / "fork.py", Run).config.name == "other"
    (configs / "base.py").write_text(BASE.replace("base", "BASE"))  # as long, and in the same second
    assert load_config(configs / "fork.py", Run).config.name == "BASE"
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_fork_of_a_fork_has_the_nearer_parent(configs: Path) -> None:
    (configs / "third.py").write_text(FORK.replace("base", "fork").replace("20", "30"))
    loaded = load_config(configs / "third.py", Run)
    assert (loaded.config.steps, loaded.parent_name) == (30, "fork")
    assert loaded.parent == Run(name="base", steps=20)


def test_two_imported_configs_make_no_parent(configs: Path) -> None:
    (configs / "both.py").write_text(f"from configs import base, fork\n{BASE}")
    assert load_config(configs / "both.py", Run).parent is None


def test_a_folder_that_is_called_like_a_library(tmp_path: Path) -> None:
    import json

    folder = tmp_path / "json"
    folder.mkdir()
    (folder / "mine.py").write_text(f"import json\nassert json.dumps(1) == '1'\n{BASE}")
    assert load_config(folder / "mine.py", Run).config == Run(name="base")
    assert sys.modules["json"] is json


def test_a_config_imported_before_stays_what_it_was(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests import this repository's own `configs`: it steps aside for this one.
    own = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "configs"}
    for name in own:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(configs.parent))
    import configs.base as before  # type: ignore[import-not-found]

    load_config(configs / "fork.py", Run)
    assert sys.modules["configs.base"] is before
    for name in ("configs", "configs.base"):
        del sys.modules[name]
    sys.modules.update(own)


def test_integers_become_the_floats_they_stand_for(configs: Path) -> None:
    (configs / "base.py").write_text(BASE.replace("'base'", "'base', rate=1"))
    assert repr(load_config(configs / "base.py", Run).config.rate) == "1.0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\n", ": it defines no get_config()"),
        ("def get_config():\n    return {}\n", ": get_config() must return Run, not dict"),
        (BASE.replace("'base'", "'base', rate='10'"), ": rate: expected float, got '10'"),
        (BASE.replace("'base'", "'base', steps=0"), " line 4: steps=0 must be positive"),
        (BASE.replace("name", "nam"), " line 4: TypeError: Run.__init__() got an unexpected keyword argument 'nam'"),
        ("import os\n\nraise OSError('two\\n  lines')\n", " line 3: OSError: two lines"),
        ("def get_config(:\n", " line 1: SyntaxError: invalid syntax"),
        (FORK.replace("import base", "import bse"), " line 2: ImportError: cannot import name 'bse' from 'configs'"),
        ("import json\n\ndef get_config():\n    return json.loads('')\n", " line 4: JSONDecodeError: Expecting value"),
    ],
)
def test_a_broken_file_is_blamed_in_one_line(configs: Path, content: str, message: str) -> None:
    file = configs / "broken.py"
    file.write_text(content)
    with pytest.raises(InputError) as caught:
        load_config(file, Run)
    assert str(caught.value).startswith(f"{file}{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config():\n    return 1 / 0\n", "base.py line 2: ZeroDivisionError: division by zero"),
        ("x = (\n", "base.py line 1: SyntaxError: '(' was never closed"),
        ("def get_config():\n    return 1\n", "fork.py: get_config() of its parent base must return Run, not int"),
    ],
)
def test_a_broken_parent_is_blamed_itself(configs: Path, content: str, message: str) -> None:
    (configs / "base.py").write_text(content)
    if "its parent" in message:  # a fork that ignores it
        (configs / "fork.py").write_text(f"from configs import base\n{BASE}")
    with pytest.raises(InputError) as caught:
        load_config(configs / "fork.py", Run)
    assert str(caught.value) == f"{configs}/{message}"


def test_a_missing_file_names_those_beside_it(configs: Path) -> None:
    with pytest.raises(InputError, match=rf"^no config file {configs}/frk\.py; did you mean {configs}/fork\.py\?$"):
        load_config(configs / "frk.py", Run)
    with pytest.raises(InputError, match=r"; the directory .*/absent does not exist$"):
        load_config(configs / "absent" / "fork.py", Run)
    (configs / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"its name must end in \.py$"):
        load_config(configs / "notes.txt", Run)
