"""The seal: what changes in a checkpoint after it was written is found, and named, before anything is read."""

import json
from pathlib import Path

import pytest

from hsai.errors import InputError
from hsai.train.seal import SEAL, check_seal, write_seal


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A directory of three files, one of them empty, under a seal."""
    (tmp_path / "state" / "d").mkdir(parents=True)
    (tmp_path / "state" / "d" / "0").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "state" / "empty").write_bytes(b"")
    (tmp_path / "record").write_text('{"next_step": 5}')
    (tmp_path / "_CHECKPOINT_METADATA").write_text("{}")
    write_seal(tmp_path)
    return tmp_path


def test_what_was_written_passes(sealed: Path) -> None:
    check_seal(sealed)
    assert set(json.loads((sealed / SEAL).read_text())["files"]) == {"record", "state/d/0", "state/empty"}


def test_what_orbax_writes_after_the_seal_is_no_damage(sealed: Path) -> None:
    """It stores the time of the commit in a file that was there already, and may add another, before the rename."""
    (sealed / "_CHECKPOINT_METADATA").write_text('{"commit_timestamp_nsecs": 1}')
    (sealed / "commit_success.txt").write_text("yes")
    check_seal(sealed)


@pytest.mark.parametrize("name", ["record", "state/d/0"])
@pytest.mark.parametrize("place", [0, -1])
def test_one_flipped_bit_is_found(sealed: Path, name: str, place: int) -> None:
    content = bytearray((sealed / name).read_bytes())
    content[place] ^= 1
    (sealed / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} was altered"):
        check_seal(sealed)


@pytest.mark.parametrize("name", ["record", "state/d/0", "state/empty"])
def test_a_missing_file_is_named(sealed: Path, name: str) -> None:
    (sealed / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        check_seal(sealed)


def test_a_stranger_is_named(sealed: Path) -> None:
    (sealed / "state" / "d" / "1").write_bytes(b"")
    with pytest.raises(InputError, match="state/d/1 is not part of the checkpoint"):
        check_seal(sealed)


def test_several_processes_read_each_file_once(sealed: Path) -> None:
    """Each checks a share: of two, exactly one finds the damage, and names alone are checked by both."""
    (sealed / "state" / "d" / "0").write_bytes(b"another")
    found = []
    for part in range(2):
        try:
            check_seal(sealed, part=part, parts=2)
        except InputError as error:
            found.append(str(error))
    assert len(found) == 1 and "state/d/0 was altered" in found[0]
    (sealed / "record").unlink()
    for part in range(2):
        with pytest.raises(InputError, match="record is missing"):
            check_seal(sealed, part=part, parts=2)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 2, "files": {}}', '{"version": 1, "files": []}'])
def test_what_is_no_seal_is_refused(sealed: Path, text: str) -> None:
    (sealed / SEAL).write_text(text)
    with pytest.raises(InputError, match=SEAL):
        check_seal(sealed)


def test_no_seal_at_all_is_refused(sealed: Path) -> None:
    (sealed / SEAL).unlink()
    with pytest.raises(InputError, match=f"cannot read {sealed / SEAL}"):
        check_seal(sealed)
