"""Structured logs on standard error: JSON for machines, coloured lines for a terminal."""

from __future__ import annotations

import sys

import structlog


def configure() -> None:
    """Set up structlog once, when the service starts."""
    renderer: structlog.types.Processor = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
