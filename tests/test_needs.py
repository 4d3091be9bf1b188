"""What is missing skips tests, and fails CI."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.needs import NO_SKIPS, bring, needs, require

ROOT = Path(__file__).resolve().parent.parent


def test_what_is_missing_fails_where_nothing_may_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NO_SKIPS, raising=False)
    assert needs(False, "no browser").args == (True,)
    with pytest.raises(pytest.skip.Exception, match="no browser"):
        require(False, "no browser")
    monkeypatch.setenv(NO_SKIPS, "1")
    assert needs(True, "no browser").args == (False,)
    require(True, "no browser")
    for ask in (needs, require):
        with pytest.raises(pytest.fail.Exception, match="no browser"):
            ask(False, "no browser")
    assert bring("json") is json
    with pytest.raises(pytest.fail.Exception, match="no module_of_nobody"):
        bring("module_of_nobody")


@pytest.mark.parametrize(("told", "status"), [({}, 0), ({NO_SKIPS: "1"}, 2)])
def test_a_run_without_the_tool_is_red_in_ci(told: dict[str, str], status: int, tmp_path: Path) -> None:
    """The run as a whole, whose status is what CI reads."""
    (tmp_path / "test_tool.py").write_text(
        "from tests.needs import needs\n@needs(False, 'no tool')\ndef test_it(): ...\ndef test_other(): ...\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **told}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "test_tool.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout
    assert "no tool" in done.stdout or not status


def test_ci_skips_nothing_that_it_installs() -> None:
    assert f"export {NO_SKIPS}=1\n" in (ROOT / ".ci" / "run").read_text()
