"""``hemacrypt serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from hemacrypt.errors import HemacryptError


def serve(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(help="Bundle directories to serve, or names of embedded bundles. [default: balanced]"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 lets the system choose. [default: 50051]")] = None,
    store: Annotated[Path | None, typer.Option(help="Where evaluation keys are kept.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes. [default: one per core]")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that share one request. [default: 1]")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Engine that evaluates: vector, or seal, the reference. [default: vector]")
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(help="ckks alone, or ckks,bfv: also exact evaluation on integers. [default: ckks,bfv]"),
    ] = None,
    precision: Annotated[
        int | None,
        typer.Option(help="k for logits to within 2^-k under CKKS. [default: what each model's margins ask for]"),
    ] = None,
    key_budget_mb: Annotated[
        int | None, typer.Option(help="Megabytes that a client's evaluation keys may take. [default: 34]")
    ] = None,
    port_file: Annotated[Path | None, typer.Option(help="Write the port here once the service is ready.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM certificate chain; needs --tls-key.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key of the certificate.")] = None,
) -> None:
    """Serve models over gRPC: evaluate encrypted images without being able to read them.

    Every setting can also come from the environment as HEMACRYPT_<NAME>, for example HEMACRYPT_WORKERS=4.
    """
    from pydantic_settings import SettingsError

    from hemacrypt.embedded import find_bundle
    from service import logs
    from service.pool import PoolError
    from service.server import Service
    from service.settings import Settings

    chosen: dict[str, Any] = {
        "host": host,
        "port": port,
        "store": store,
        "workers": workers,
        "threads": threads,
        "engine": engine,
        "schemes": None if schemes is None else tuple(scheme.strip() for scheme in schemes.split(",")),
        "precision": precision,
        "key_budget_mb": key_budget_mb,
        "tls_certificate": tls_certificate,
        "tls_key": tls_key,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    logs.configure()
    try:
        settings = Settings(**chosen)
        named = tuple(find_bundle(bundle) for bundle in bundles or settings.bundles or (None,))
        settings = settings.model_copy(update={"bundles": named})
        if port_file is not None and not port_file.parent.is_dir():
            raise FileNotFoundError(f"{port_file.parent} is no directory; name another --port-file")
        service = Service(settings)
    except ValidationError as error:
        for problem in error.errors():
            typer.secho(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}", err=True, fg="red")
        raise typer.Exit(2) from None
    except SettingsError as error:
        typer.secho(f"{error}; lists are written as JSON", err=True, fg="red")
        raise typer.Exit(2) from None
    except (HemacryptError, PoolError, OSError) as error:
        typer.secho(f"cannot serve: {error}", err=True, fg="red")
        raise typer.Exit(1) from None

    def tell_port() -> None:
        if port_file:
            scratch = port_file.with_name(port_file.name + ".new")
            scratch.write_text(f"{service.port}\n", encoding="ascii")
            scratch.rename(port_file)

    service.run_until_told(when_ready=tell_port)
