"""Word of a new backbone, as an event that the deployment `quee-new-backbones/watch` is triggered by."""

import asyncio

from prefect.events import Event, Resource
from prefect.events.clients import get_events_client

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
    except Exception as error:  # Prefect raises that very class where the event stream does not let it in
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ServerError(
            f"Prefect server at {url}: it does not take events ({why}); is it the right one, and "
            "PREFECT_API_AUTH_STRING its login?"
        ) from error
    return str(event.id)


async def _emit(event: Event) -> None:
    async with get_events_client(checkpoint_every=1) as client:
        await client.emit(event)
