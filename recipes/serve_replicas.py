"""Run several servers of one model at one address, by Ray Serve.

    pip install "anydepth[replicas]"
    serve run recipes.serve_replicas:build target=embedded replicas=2

Each replica is a process with the model, its queue and its batch; Ray Serve hands a request to one of them, starts
another where one ends, and over several machines of a Ray cluster spreads them. `target` may be anything that
`anydepth serve` takes; other arguments are `name`, `api_key`, `dtype`, `weights`, `data` and `cpus` of each replica.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from ray import serve

MAX_QUEUE = 64  # requests of a replica: those that it decodes and those that wait


def build(arguments: dict[str, str]) -> serve.Application:
    """Return the application that `serve run` starts."""
    target, cpus = arguments["target"], int(arguments.get("cpus", "1"))
    name, key = arguments.get("name", Path(target).name), arguments.get("api_key")
    loading = {option: arguments[option] for option in ("data", "dtype", "weights") if option in arguments}

    def app() -> FastAPI:
        import torch

        from anydepth.serve.api import Settings, create_app
        from anydepth.serve.opening import open_service

        torch.set_num_threads(cpus)
        service, tokenizer = open_service(target, max_queue=MAX_QUEUE, **loading)
        return create_app(service, tokenizer, Settings(name, api_key=key))

    @serve.deployment(
        name="anydepth",
        num_replicas=int(arguments.get("replicas", "2")),
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=2 * MAX_QUEUE,  # more than it holds: the replica itself refuses the rest, with 429
        max_queued_requests=MAX_QUEUE,
        health_check_period_s=5,
    )
    @serve.ingress(app)
    class Replica:
        pass

    return Replica.bind()
