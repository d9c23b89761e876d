"""The app on several replicas behind one address, by Ray Serve: `serve run emu3.serving.replicas:build local=true`.

Each replica is a process with an engine of its own. Ray's proxy gives a request to one of the less busy, and the number
of replicas follows the number of requests under way, those that wait among them.
"""

# No `from __future__ import annotations`: Ray reads the class of the arguments from the signature of `build`.

from dataclasses import asdict, fields
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig

from emu3.options import Load, Serve, make
from emu3.serving.schema import given, option_fields

_LOAD = [each.name for each in fields(Load)]
# Ray has its own address.
_SERVE = [each.name for each in fields(Serve) if each.name not in ("host", "port")]
# All that a client may ask for at once goes to the engine, which runs it together and says what waits.
_MOST_REQUESTS = 1024
_UPSCALE_SECONDS = 5.0


class _Scale(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = Field(default="nano", description="Checkpoint: nano (shipped), a folder, or a hub id.")
    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)] = 4
    requests: float = Field(default=16, gt=0, description="How many a replica should have; with more, one is added.")
    local: bool = Field(default=False, description="Only this machine reaches Ray's address: no key is needed.")
    cpus: float = Field(default=1, gt=0, description="Of a replica; PyTorch runs as many threads.")
    gpus: float = Field(default=0, ge=0, description="Of a replica.")


Replicas = option_fields("Replicas", option_fields("Replicas", _Scale, Load, _LOAD), Serve, _SERVE)
"""Arguments of `build`: how many replicas, and the options of `emu3 serve` but for its address, which is Ray's."""


def build(arguments: Replicas) -> ray_serve.Application:  # type: ignore[valid-type]
    """The application that Ray Serve runs.

    Raises:
        ValueError: an option is wrong; or there is no key, and `local` does not say that none is needed.
    """
    wanted: Any = arguments
    load, serve = make(Load, given(wanted, *_LOAD)), make(Serve, given(wanted, *_SERVE))
    if serve.api_key is None and not wanted.local:
        raise ValueError(
            "Ray may let other machines in, so a key is needed: api_key=KEY; or local=true, where http_options of Ray "
            "say host: 127.0.0.1"
        )
    if wanted.min_replicas > wanted.max_replicas:
        raise ValueError(f"min_replicas={wanted.min_replicas} is above max_replicas={wanted.max_replicas}")

    def make_app() -> FastAPI:
        from emu3.pipeline import Emu3Pipeline
        from emu3.serving.app import create_app

        return create_app(Emu3Pipeline.from_pretrained(wanted.model, **asdict(load)), wanted.model, serve)

    @ray_serve.ingress(make_app)
    class Replica:
        app: FastAPI

        def check_health(self) -> None:
            """Ray replaces a replica for which this raises."""
            if not self.app.state.service.worker.alive:
                raise RuntimeError("the worker is dead")

    make_deployment = ray_serve.deployment(
        name="emu3",
        max_ongoing_requests=_MOST_REQUESTS,
        graceful_shutdown_timeout_s=serve.drain_seconds,
        ray_actor_options={"num_cpus": wanted.cpus, "num_gpus": wanted.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=wanted.min_replicas,
            max_replicas=wanted.max_replicas,
            target_ongoing_requests=wanted.requests,
            upscale_delay_s=_UPSCALE_SECONDS,
        ),
    )
    return make_deployment(Replica).bind()
