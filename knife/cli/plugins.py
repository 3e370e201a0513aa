"""The commands of `knife plugins`: what is installed, whether it keeps its contract, and a start for your own."""

import shlex
import traceback
from pathlib import Path
from typing import Annotated

import typer

from knife.cli.options import Json
from knife.cli.terminal import give, give_json, say, show_table

plugins_app = typer.Typer(help="Guidance tasks: what is installed, and a start for your own.", no_args_is_help=True)


@plugins_app.command("list")
def plugins_list(as_json: Json = False) -> None:
    """List tasks and judges: hooks, distribution, version, and what is wrong with those that cannot be used."""
    from knife.tasks import JUDGES, plugins

    keys = ("hooks", "distribution", "version", "status")
    listed = {"task": plugins(), "judge": plugins(group=JUDGES)}
    rows = [
        [{role: row.task, **{key: getattr(row, key) for key in keys}} for row in found]
        for role, found in listed.items()
    ]
    if as_json:
        give_json([row for part in rows for row in part])
    else:
        for part in filter(None, rows):
            show_table(part)


@plugins_app.command("check")
def plugins_check(name: Annotated[str, typer.Argument(help="The name of a task or a judge.")]) -> None:
    """Import a plugin and hold it to its contract; the exit code is 1 if it fails, and stderr says where."""
    from knife.contract import check_plugin
    from knife.errors import TaskError

    try:
        give(check_plugin(name))
    except TaskError as error:
        for line in "".join(traceback.format_exception(error.__cause__ or error)).splitlines():
            say(line)
        say(f"knife: {error}")
        raise typer.Exit(1) from None


@plugins_app.command("new")
def plugins_new(
    name: Annotated[str, typer.Argument(help="The word after --task.")],
    folder: Annotated[Path, typer.Option("--folder", help="Where the package goes.")] = Path(),
) -> None:
    """Write a working plugin package to start from."""
    from knife.scaffold import new_plugin

    made = new_plugin(name, folder)
    give(made)
    say(f"Install it with: pip install -e {shlex.quote(str(made))}   Then: knife plugins list")
