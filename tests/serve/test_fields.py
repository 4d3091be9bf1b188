"""Every field that the server reads has a value that it refuses; what has no effect must be of its type, too."""

from typing import Any

import pytest

from hsai.serve.fields import Fields
from tests.serve.test_requests import CASES, READERS, chat


@pytest.mark.parametrize("reader", READERS)
def test_every_field_has_a_value_that_cannot_be(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that the server reads from a body with all objects: each is refused in a case above."""
    known = set()
    take = Fields.take

    def watch(fields: Fields, name: str) -> Any:
        known.add(fields.path(name))
        return take(fields, name)

    monkeypatch.setattr(Fields, "take", watch)
    schema = {"type": "json_schema", "json_schema": {"schema": {}}}
    body = {"stream": True, "stream_options": {}, "response_format": schema}
    if reader == "chat":
        body["messages"] = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    READERS[reader](**body)
    refused = {param for whose, _, param, names in CASES if whose == reader and "missing" not in names}
    assert len(known) > 25 and known - refused == set()


def test_what_has_no_effect_is_taken_if_it_is_of_its_type() -> None:
    prediction = {"type": "content", "content": "x"}
    taken = {"user": "u", "metadata": {"a": "b"}, "service_tier": "flex", "safety_identifier": "s"}
    assert chat(**taken, prompt_cache_key="k", prediction=prediction, seed=1) == chat(seed=1)
