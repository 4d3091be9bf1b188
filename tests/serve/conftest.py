"""A tiny engine, and a server whose service answers by a script."""

from collections.abc import Iterator

import pytest

from hsai.data.assets import Assets
from hsai.infer import Engine
from tests.export.tiny_models import CHATTY_ASSETS, make_chatty_tokenizer, make_model
from tests.serve.scripted import RunningServer, ScriptedService


@pytest.fixture(scope="session")
def engine() -> Engine:
    """Random weights, a chat template, and a context of 48."""
    return Engine.trace(make_model(), make_chatty_tokenizer(), Assets.parse(CHATTY_ASSETS))


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[RunningServer]:
    """Around a scripted service."""
    with RunningServer(engine, ScriptedService()) as server:
        yield server


@pytest.fixture
def service(server: RunningServer) -> Iterator[ScriptedService]:
    """Of `server`: says "Hello, world" unless a test gives it another script."""
    server.service.reset()
    yield server.service
    server.service.reset()
