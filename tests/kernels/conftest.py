"""Fixtures: a test once for every instruction set of the native kernels; a test in which no TPU kernel races."""

import contextlib
from collections.abc import Iterator

import pytest

from hsai_kernels import native
from tests.kernels import native_build


@pytest.fixture(params=native_build.list_runnable())
def instruction_set(request):
    """Each that this machine runs; what it lacks is refused, see test_native.py."""
    fastest = native.name_instruction_set()
    native.use_instruction_set(request.param)
    assert native.name_instruction_set() == request.param
    yield
    native.use_instruction_set(fastest)


@contextlib.contextmanager
def forbid_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Fails if the TPU interpreter found a race inside: it prints that, and goes on (hsai_kernels.interpret)."""
    capfd.readouterr()
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.fixture
def no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """`forbid_races` for the whole test; test_interpret.py shows that it can fail."""
    with forbid_races(capfd):
        yield
