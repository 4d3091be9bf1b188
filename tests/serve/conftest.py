"""A tiny engine, and a server whose service answers by a script."""

from collections.abc import Iterator

import pytest

from hsai.data.assets import Assets
from hsai.infer import Engine
from tests.export.tiny_models import CHATTY_ASSETS, make_chatty_tokenizer, make_model
from tests.serve.scripted import RunningServer, ScriptedService

CONTEXT = 48


@pytest.fixture(scope="session")
def engine() -> Engine:
    """Random weights, a chat template, and a context of 48."""
    return Engine.trace(make_model(), make_chatty_tokenizer(), Assets.parse(CHATTY_ASSETS))


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    """Says "Hello, world" unless a test gives it another script."""
    service = ScriptedService()
    yield service
    service.drain()
    service.join()


@pytest.fixture
def server(engine: Engine, service: ScriptedService) -> Iterator[RunningServer]:
    """Around `service`."""
    with RunningServer(engine, service) as server:
        yield server
