"""Word of a new backbone, as an event that the deployment `quee-new-backbones/watch` is triggered by."""

import asyncio

from prefect.events import Event, Resource
from prefect.events.clients import get_events_client
from websockets.exceptions import WebSocketException

from flows.prefect_server import check_server
from quee_core.errors import ServerError

ANNOUNCED = "quee.backbone.announced"  # prefect.yaml's trigger expects it


def announce_backbone(name: str) -> str:
    """Emit the event, and return its id once the server has it. Raises ServerError if none takes it."""
    url = check_server()
    event = Event(
        event=ANNOUNCED,
        resource=Resource({"prefect.resource.id": f"quee.backbone.{name}", "quee.backbone.name": name}),
    )
    try:
        asyncio.run(_emit(event))
    except (OSError, WebSocketException) as error:
        raise ServerError(
            f"Prefect server at {url}: it does not take events ({error}); is it the right one?"
        ) from error
    return str(event.id)


async def _emit(event: Event) -> None:
    async with get_events_client(checkpoint_every=1) as client:
        await client.emit(event)
