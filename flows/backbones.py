"""`quee backbones`: what can be swept, and word of what is new."""

import json
from typing import Annotated

import typer

from flows.messages import reporting_faults
from quee_core.errors import ConfigError, did_you_mean

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")]

app = typer.Typer(help="List backbones, and announce new ones.", no_args_is_help=True, add_completion=False)


@app.command("list")
@reporting_faults
def list_all(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with *.", metavar="[PATTERN]")] = "",
    as_json: JsonOption = False,
) -> None:
    """List the backbones that can be swept: quee's own, and timm's vision transformers."""
    from quee_core.backbones.registry import list_backbones

    names = list_backbones(pattern)
    if not names:
        raise ConfigError(f"no backbone matches {pattern!r}; {did_you_mean(pattern, list_backbones())}")
    typer.echo(json.dumps(names) if as_json else "\n".join(names))


@app.command()
@reporting_faults
def announce(
    name: Annotated[
        str, typer.Argument(help="A file of the watched folder without its ending, or one of timm's names.")
    ],
) -> None:
    """Tell the Prefect server at PREFECT_API_URL of a new backbone: the deployment that watches starts its sweep."""
    from flows.announcing import announce_backbone

    event = announce_backbone(name)
    typer.echo(f"announced {name}: event {event}")
