"""Metrics for Prometheus: measurements of the HTTP layer, and the engine's statistics when scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxpaged.engine.request import EngineStats, RequestTimes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5)


class _EngineCollector(Collector):
    """Collects the engine's statistics, under our names and under llama-server's."""

    def __init__(self, metrics: Metrics, stats: Callable[[], EngineStats | None]) -> None:
        self._metrics, self._stats = metrics, stats

    def describe(self) -> list[Metric]:
        return []  # otherwise the registry would call collect to learn the names

    def collect(self) -> Iterator[Metric]:
        stats, seen = self._stats(), self._metrics
        if stats is None:
            return
        in_use = stats.pages_used / max(stats.pages_total, 1)
        gauges = {
            "jaxpaged_requests_running": (stats.running, "Running samples."),
            "jaxpaged_requests_waiting": (stats.waiting, "Waiting samples."),
            "jaxpaged_requests_swapped": (stats.swapped, "Waiting samples with pages in host memory."),
            "jaxpaged_kv_pages": (stats.pages_total, "Pages of the pool."),
            "jaxpaged_kv_pages_used": (stats.pages_used, "Pages held by running sequences."),
            "jaxpaged_kv_pages_cached": (
                stats.pages_cached,
                "Pages held by the prefix cache alone.",
            ),
            "jaxpaged_kv_pages_free": (stats.pages_free, "Free pages."),
            "jaxpaged_kv_usage_ratio": (in_use, "Used pages over all pages; cached ones are not used."),
            "jaxpaged_kv_waste_ratio": (stats.waste, "Share of token slots in used pages that are empty."),
            "jaxpaged_kv_tokens_live": (stats.tokens_live, "Tokens of running sequences."),
            "jaxpaged_kv_page_bytes": (
                stats.bytes_per_page,
                "Bytes of one page, over all layers of a group.",
            ),
            "llamacpp:requests_processing": (stats.running, "Number of requests processing."),
            "llamacpp:requests_deferred": (stats.waiting, "Number of requests deferred."),
            "llamacpp:kv_cache_usage_ratio": (in_use, "KV-cache usage. 1 means 100 percent usage."),
            "llamacpp:prompt_tokens_seconds": (
                seen.prompt_tokens / seen.prompt_seconds if seen.prompt_seconds else 0.0,
                "Average prompt throughput in tokens/s.",
            ),
            "llamacpp:predicted_tokens_seconds": (
                seen.predicted_tokens / seen.predicted_seconds if seen.predicted_seconds else 0.0,
                "Average generation throughput in tokens/s.",
            ),
        }
        counters = {
            "jaxpaged_steps": (stats.steps, "Steps of the model."),
            "jaxpaged_prompt_tokens": (stats.prompt_tokens, "Prompt tokens computed, cached ones excluded."),
            "jaxpaged_embedded_tokens": (seen.embedded_tokens, "Tokens of texts embedded or ranked."),
            "jaxpaged_generated_tokens": (stats.generated_tokens, "Tokens generated."),
            "jaxpaged_prefix_query_tokens": (
                stats.prefix_queries,
                "Prompt tokens looked up in the prefix cache.",
            ),
            "jaxpaged_prefix_hit_tokens": (stats.prefix_hits, "Prompt tokens found in the prefix cache."),
            "jaxpaged_preemptions": (stats.preemptions, "Preempted sequences."),
            "jaxpaged_swaps": (stats.swaps, "Preempted sequences swapped to host memory."),
            "jaxpaged_evictions": (stats.evictions, "Pages evicted from the prefix cache."),
            "jaxpaged_context_shifts": (stats.shifts, "Context shifts."),
            "jaxpaged_nan_samples": (stats.nan_samples, "Samples ended because the model's logits held NaN."),
            "jaxpaged_late_compilations": (
                stats.compiled_late,
                "Programs compiled after start-up; anything but 0 is a bug.",
            ),
            "llamacpp:prompt_tokens": (
                stats.prompt_tokens + seen.embedded_tokens,
                "Number of prompt tokens processed.",
            ),
            "llamacpp:prompt_tokens_cached": (
                stats.prefix_hits,
                "Number of prompt tokens that were in the cache.",
            ),
            "llamacpp:prompt_seconds": (seen.prompt_seconds, "Prompt process time."),
            "llamacpp:tokens_predicted": (stats.generated_tokens, "Number of generation tokens processed."),
            "llamacpp:tokens_predicted_seconds": (seen.predicted_seconds, "Predict process time."),
            "llamacpp:n_decode": (
                stats.steps + seen.embedded_texts,
                "Total number of runs of the model; an embedded text counts as one.",
            ),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        labels = ["group", "layers", "window", "state"]
        pages = GaugeMetricFamily("jaxpaged_kv_group_pages", "Pages of each layer group.", labels=labels)
        for i, group in enumerate(stats.groups):
            own = [str(i), str(group.layers), str(group.window or "")]
            for state in ("used", "cached", "free"):
                pages.add_metric([*own, state], getattr(group, f"pages_{state}"))
        yield pages
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(name, text, value=value)


class Metrics:
    """The metrics of one server, in their own registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.prompt_tokens = self.predicted_tokens = 0
        """Totals of finished samples."""
        self.embedded_texts = self.embedded_tokens = 0
        """Texts that were embedded or ranked, and their tokens."""
        self.prompt_seconds = self.predicted_seconds = 0.0
        self.finished = Counter("jaxpaged_finished", "Finished samples.", ["reason"], registry=self._registry)
        self.errors = Counter(
            "jaxpaged_http_errors", "Requests answered with an error.", ["status"], registry=self._registry
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _LATENCIES
        )
        self.inter_token = self._histogram("inter_token_seconds", "Between two tokens of a sample.", _SHORT)
        self.end_to_end = self._histogram("request_seconds", "Arrival to last token.", _LATENCIES)
        self.queue = self._histogram("queue_seconds", "Arrival to the first step.", _LATENCIES)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"jaxpaged_{name}", text, buckets=buckets, registry=self._registry)

    def watch(self, stats: Callable[[], EngineStats | None]) -> None:
        """Adds the engine's statistics; None = no engine yet."""
        self._registry.register(_EngineCollector(self, stats))

    def text(self) -> bytes:
        """All metrics in Prometheus' format."""
        return generate_latest(self._registry)

    def began(self, times: RequestTimes) -> None:
        """Records the first token of a sample."""
        if times.first_token:
            self.first_token.observe(max(0.0, times.first_token - times.arrived))
        if times.scheduled:
            self.queue.observe(max(0.0, times.scheduled - times.arrived))

    def ended(self, times: RequestTimes, *, reason: str, prompt: int, generated: int, now: float) -> None:
        """Records a finished sample. prompt: prompt tokens computed for it."""
        self.finished.labels(reason).inc()
        self.end_to_end.observe(max(0.0, now - times.arrived))
        self.prompt_tokens += prompt
        self.predicted_tokens += max(0, generated - 1)  # the first comes with the last prefill step
        if times.first_token:
            self.prompt_seconds += max(0.0, times.first_token - times.scheduled)
            self.predicted_seconds += max(0.0, now - times.first_token)
