"""What the server counts, in the form that Prometheus reads."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from foveate.serve.reader import Said

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        counter, gauge = partial(Counter, registry=self._registry), partial(Gauge, registry=self._registry)
        times = partial(Histogram, buckets=_SECONDS, registry=self._registry)
        self.requests = counter("foveate_requests", "Questions, by the status of their response", ["status"])
        self.inside = gauge("foveate_requests_inside", "Questions being read, waiting or being answered")
        self.waiting = gauge("foveate_requests_waiting", "Questions waiting for the model")
        self.seconds = times("foveate_request_seconds", "From a question's first byte to its answer's last")
        self.first = times("foveate_first_text_seconds", "From a question read to its answer's first text")
        self._prompt = counter("foveate_prompt_tokens", "Tokens of prompts, before and after compression", ["when"])
        self._visual = counter("foveate_visual_tokens", "Tokens of pictures, before and after compression", ["when"])
        self._said = counter("foveate_completion_tokens", "Tokens of answers")

    def answered(self, said: Said) -> None:
        """Count the tokens of an answer."""
        self._prompt.labels("before").inc(said.prompt_tokens_before)
        self._prompt.labels("after").inc(said.prompt_tokens)
        self._visual.labels("before").inc(said.report.tokens)
        self._visual.labels("after").inc(said.report.kept)
        self._said.inc(said.tokens)

    def text(self) -> bytes:
        """Return all counts."""
        return generate_latest(self._registry)
