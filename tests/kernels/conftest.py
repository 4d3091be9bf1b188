"""The fixture that runs a test once for every instruction set of the native kernels."""

import pytest

from hsai_kernels import native
from tests.kernels import native_build

INSTRUCTION_SETS = native_build.INSTRUCTION_SETS.get(native_build.PROCESSOR, ("baseline",))


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    """Each that this machine runs; one that it lacks is refused, which is then the test."""
    fastest = native.name_instruction_set()
    try:
        native.use_instruction_set(request.param)
        assert native.name_instruction_set() == request.param
    except ValueError as error:
        assert request.param in str(error) and request.param not in ("baseline", fastest)
    yield
    native.use_instruction_set(fastest)
