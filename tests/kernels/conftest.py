"""The fixture that runs a test once for every instruction set of the native kernels."""

import pytest

from hsai_kernels import native

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    """Each that this machine runs; one that it lacks is refused, which is then the test."""
    fastest = native.name_instruction_set()
    if INSTRUCTION_SETS.index(request.param) > INSTRUCTION_SETS.index(fastest):
        with pytest.raises(ValueError, match=request.param):
            native.use_instruction_set(request.param)
    else:
        native.use_instruction_set(request.param)
    yield
    native.use_instruction_set(fastest)
