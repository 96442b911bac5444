"""``python -m service``: the same as ``hemacrypt serve``."""

import typer

from service.cli import serve

if __name__ == "__main__":
    typer.run(serve)
