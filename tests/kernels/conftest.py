"""The fixture that runs a test once for every instruction set of the native kernels."""

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
