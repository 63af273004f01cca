"""``python -m bench NAME``: each command prints a table and one JSON line; see bench/README.md."""

import typer

from bench import deployment, flower, hosts, kills, memory, rounds, scale, steps, teachers, threads

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
for module in (threads, steps, rounds, scale, memory, flower, deployment, hosts, teachers, kills):
    app.command(module.__name__.rpartition(".")[2])(module.run)


if __name__ == "__main__":
    app()
