"""What Prometheus reads of a server."""

from __future__ import annotations

import time

from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from anydepth.serve.service import Job, Service

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counts of a service, in a registry of their own: a process may have several."""

    def __init__(self, service: Service) -> None:
        own = self.registry = CollectorRegistry()
        self.tokens = Counter("anydepth_generated_tokens", "Tokens said.", registry=own)
        self.prompts = Counter("anydepth_prompt_tokens", "Tokens of prompts read.", registry=own)
        self.first = Histogram("anydepth_first_token_seconds", "From request to answer.", buckets=SECONDS, registry=own)
        self.gap = Histogram("anydepth_token_gap_seconds", "Between what is said.", buckets=SECONDS, registry=own)
        waiting = Gauge("anydepth_waiting_requests", "In the queue.", registry=own)
        waiting.set_function(lambda: service.num_waiting)
        running = Gauge("anydepth_running_requests", "Being decoded.", registry=own)
        running.set_function(lambda: service.num_running)
        service.observers.append(self._observe)

    def _observe(self, job: Job, num_tokens: int) -> None:
        now = time.monotonic()
        if job.last_token is None:
            self.prompts.inc(len(job.request.prompt))
            self.first.observe(now - job.arrived)
        else:
            self.gap.observe(now - job.last_token)
        self.tokens.inc(num_tokens)

    async def page(self) -> Response:
        """`GET /metrics`."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)
