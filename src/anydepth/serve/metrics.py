"""Metrics of a server, for Prometheus."""

from __future__ import annotations

import time

from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from anydepth.serve.service import Job, Service

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters of a service, each service with its own registry: a process may have several."""

    def __init__(self, service: Service) -> None:
        own = self.registry = CollectorRegistry()
        self.tokens = Counter("anydepth_generated_tokens", "Generated tokens.", registry=own)
        self.prompts = Counter("anydepth_prompt_tokens", "Prompt tokens.", registry=own)
        self.known = Counter("anydepth_cached_prompt_tokens", "Prompt tokens that were not read again.", registry=own)
        self.first = Histogram(
            "anydepth_first_token_seconds", "Seconds from request to first token.", buckets=SECONDS, registry=own
        )
        self.gap = Histogram(
            "anydepth_token_gap_seconds", "Seconds between pieces of an answer.", buckets=SECONDS, registry=own
        )
        waiting = Gauge("anydepth_waiting_requests", "Requests in the queue.", registry=own)
        waiting.set_function(lambda: service.num_waiting)
        running = Gauge("anydepth_running_requests", "Requests being decoded.", registry=own)
        running.set_function(lambda: service.num_running)
        service.observers.append(self._observe)

    def _observe(self, job: Job, num_tokens: int) -> None:
        now = time.monotonic()
        if job.last_token is None:
            self.prompts.inc(len(job.request.prompt))
            self.known.inc(job.request.num_known)
            self.first.observe(now - job.arrived)
        else:
            self.gap.observe(now - job.last_token)
        self.tokens.inc(num_tokens)

    async def page(self) -> Response:
        """Answer `GET /metrics`."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)
