"""What a server counts, read by Prometheus' own parser."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hsai.infer import Engine
from hsai.infer.service import Busy
from tests.serve.scripted import RunningServer, ScriptedService, fail, speak


def test_metrics(engine: Engine) -> None:
    service = ScriptedService()
    with RunningServer(engine, service) as server:
        server.complete()
        server.chat(stream=True)
        service.script = fail
        server.complete()
        service.script = speak()  # an end without a token, which has no times
        server.complete()
        service.refusal = Busy(1, 1.0)
        server.complete()
        server.client.get("/v1/models/tiny")
        server.client.get("/nope/%0a")
        response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert all(family.documentation for family in families.values())
    wanted = {
        ("hsai_http_responses_total", "/v1/completions", "200"): 2,
        ("hsai_http_responses_total", "/v1/completions", "500"): 1,
        ("hsai_http_responses_total", "/v1/completions", "429"): 1,
        ("hsai_http_responses_total", "/v1/chat/completions", "200"): 1,
        ("hsai_http_responses_total", "other", "404"): 1,
        ("hsai_http_responses_total", "other", "200"): 1,
        ("hsai_requests_queued",): 2,
        ("hsai_requests_running",): 0,
        ("hsai_requests_finished_total", "end_of_text"): 3,
        ("hsai_requests_finished_total", "failed"): 1,
        ("hsai_requests_finished_total", "cancelled"): 0,
        ("hsai_requests_rejected_total",): 7,
        ("hsai_requests_preempted_total",): 1,
        ("hsai_prompt_tokens_total",): 100,
        ("hsai_cached_prompt_tokens_total",): 40,
        ("hsai_generated_tokens_total",): 50,
        ("hsai_drafted_tokens_total",): 30,
        ("hsai_accepted_tokens_total",): 20,
        ("hsai_cache_pages", "used"): 3,
        ("hsai_cache_pages", "reusable"): 5,
        ("hsai_cache_pages", "empty"): 2,
        ("hsai_time_to_first_token_seconds_count",): 3,
        ("hsai_time_to_first_token_seconds_bucket", "0.5"): 0,
        ("hsai_time_to_first_token_seconds_bucket", "1.0"): 3,
        ("hsai_time_per_token_seconds_count",): 2,
        ("hsai_time_per_token_seconds_bucket", "0.005"): 0,
        ("hsai_time_per_token_seconds_bucket", "0.01"): 2,
    }
    assert {name: samples[name] for name in wanted} == wanted
    assert samples[("hsai_time_to_first_token_seconds_sum",)] == pytest.approx(3 * 0.75)
    assert samples[("hsai_time_per_token_seconds_sum",)] == pytest.approx(2 * 0.01)
    assert samples[("process_resident_memory_bytes",)] > 1 << 20


def test_two_servers_count_apart(engine: Engine) -> None:
    counts = []
    for _ in range(2):
        with RunningServer(engine, ScriptedService()) as server:
            server.complete()
            counts.append(server.metrics()['hsai_http_responses_total{path="/v1/completions",status="200"}'])
    assert counts == [1, 1]
