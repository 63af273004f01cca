"""`python -m bench NAME`: each command prints a table and one JSON line; see bench/README.md."""

import typer

from bench import (
    collapse,
    deployment,
    experiments,
    flower,
    golden,
    hosts,
    independent,
    kills,
    memory,
    rounds,
    scale,
    steps,
    teachers,
    threads,
)

COMMANDS = (threads, steps, rounds, scale, memory, flower, deployment, hosts, teachers, kills)
COMMANDS += (golden, independent)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
for module in COMMANDS:
    app.command(module.__name__.rpartition(".")[2])(module.run)
app.add_typer(collapse.app, name="collapse")
app.add_typer(experiments.app, name="experiment")


if __name__ == "__main__":
    app()
