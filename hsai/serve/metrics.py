"""What a server counts, in Prometheus' text form.

Requests are counted here by their status; everything else the service counts itself, and is asked when it is wanted.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hsai.infer.request import FINISH_REASONS, Event
from hsai.infer.service import Service

SECONDS_TO_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SECONDS_A_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Those of one server."""

    def __init__(self, service: Service) -> None:
        """Counts from now, and asks `service` for the rest."""
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "hsai_http_responses", "Responses by path and status.", ("path", "status"), registry=self._registry
        )
        self._first = Histogram(
            "hsai_time_to_first_token_seconds",
            "From the submission of a request to its first token.",
            buckets=SECONDS_TO_FIRST,
            registry=self._registry,
        )
        self._each = Histogram(
            "hsai_time_per_token_seconds",
            "Of each request, the mean time of its tokens after the first.",
            buckets=SECONDS_A_TOKEN,
            registry=self._registry,
        )
        self._registry.register(_ServiceCollector(service))
        ProcessCollector(registry=self._registry)

    def count_response(self, path: str, status: int) -> None:
        """A response was begun."""
        self._responses.labels(path, str(status)).inc()

    def observe(self, last: Event) -> None:
        """A request ended with the event `last`; in any thread."""
        usage = last.usage
        if usage is None or usage.new_tokens == 0:
            return
        self._first.observe(usage.seconds_queued + usage.seconds_prefill)
        if usage.steps > 0:
            self._each.observe(usage.seconds_decode / usage.steps)

    def write(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)


class _ServiceCollector(Collector):
    """Asks a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        stats = self._service.stats()
        yield GaugeMetricFamily("hsai_requests_queued", "Requests that wait.", stats.queued)
        yield GaugeMetricFamily("hsai_requests_running", "Requests that are being answered.", stats.running)
        finished = CounterMetricFamily("hsai_requests_finished", "Requests that ended, by reason.", labels=["reason"])
        for reason in FINISH_REASONS:
            finished.add_metric([reason], stats.finished.get(reason, 0))
        yield finished
        yield CounterMetricFamily("hsai_requests_rejected", "Requests that found the queue full.", stats.rejected)
        yield CounterMetricFamily(
            "hsai_requests_preempted", "Times that a request gave its pages to an older one.", stats.preempted
        )
        yield CounterMetricFamily("hsai_prompt_tokens", "Tokens of prompts.", stats.prompt_tokens)
        yield CounterMetricFamily(
            "hsai_cached_prompt_tokens", "Tokens of prompts that were found in the cache.", stats.cached_tokens
        )
        yield CounterMetricFamily("hsai_generated_tokens", "Tokens made.", stats.new_tokens)
        yield CounterMetricFamily("hsai_drafted_tokens", "Tokens that speculation drafted.", stats.drafted_tokens)
        yield CounterMetricFamily(
            "hsai_accepted_tokens", "Drafted tokens that the model made too.", stats.accepted_tokens
        )
        pages = GaugeMetricFamily("hsai_cache_pages", "Pages of the cache, by what they hold.", labels=["state"])
        pages.add_metric(["used"], stats.pages_used)
        pages.add_metric(["reusable"], stats.pages_reusable)
        pages.add_metric(["empty"], stats.pages_total - stats.pages_used - stats.pages_reusable)
        yield pages
