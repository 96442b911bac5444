"""Batches: milliseconds for each of thousands of encrypted images, memory, error against the plan's bound.

Two networks: the MNIST network of CryptoNets (Gilad-Bachrach et al., 2016, with random weights of a fixed seed: time
does not depend on them) and the embedded leukaemia bundle, on its sample of cells repeated with small changes. SEAL
encrypts and decrypts; ciphertexts wait in files, as they would arrive over a line. Every image is compared with the
clear network::

    python benchmarks/batch.py mnist
    python benchmarks/batch.py leukaemia --threads 2

``service`` sends the cells through a client to a service in a process of its own, on the same machine, one worker::

    python benchmarks/batch.py service
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from audit.demo import running_service
from client_sdk import Client
from client_sdk._crypto import BatchKeyHolder
from hemacrypt.embedded import bundle_path, sample
from hemacrypt.engines.vector.batch import BatchEngine
from hemacrypt.model.bundle import Bundle
from hemacrypt.model.network import CollapsedNetwork, Convolution, Dense
from hemacrypt.model.preprocess import read_pixels
from hemacrypt.planner.throughput.ckks import plan_batch

Images = npt.NDArray[np.float64]


def mnist() -> CollapsedNetwork:
    """Return CryptoNets' network: 28×28, convolution to 5 maps of 13×13, square, dense 100, square, dense 10."""
    rng = np.random.default_rng(2016)
    network = CollapsedNetwork(
        (1, 28, 28),
        (
            Convolution(rng.normal(size=(5, 1, 5, 5)) / 5, rng.normal(size=5) / 5, (1, 28, 28), 2, ((1, 0), (1, 0))),
            Dense(rng.normal(size=(100, 845)) / 29, rng.normal(size=100) / 5),
            Dense(rng.normal(size=(10, 100)) / 10, rng.normal(size=10) / 5),
        ),
    )
    return network.calibrated(mnist_images(400, seed=1))


def mnist_images(count: int, seed: int = 0) -> Images:
    """Return images with the values of strokes on black: a smooth pattern of which a fifth is bright."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, 1, 28, 28))
    for axis in (2, 3):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)
    return np.clip(noise / 6 - 0.4, 0, 1)


def leukaemia() -> tuple[CollapsedNetwork, Images]:
    """Return the embedded bundle's network, and its sample of cells, preprocessed."""
    bundle = Bundle.read(bundle_path())
    return bundle.network, np.stack([bundle.manifest.preprocessing(cell.path) for cell in sample()])


def repeated(images: Images, count: int) -> Images:
    """Return as many images as wanted: all given ones, turned and mirrored, as often as it takes."""
    turns = [np.rot90(images, k, axes=(2, 3)) for k in range(4)]
    views = np.concatenate([*turns, *(turn[..., ::-1] for turn in turns)])
    return views[np.arange(count) % len(views)]


def measure(network: CollapsedNetwork, images: Images, threads: int, repeats: int = 1) -> dict[str, Any]:
    """Encrypt images, evaluate them as one batch, decrypt and compare with the clear network.

    Parameters
    ----------
    network:
        A network whose magnitudes were measured.
    images:
        Shape (images, channels, height, width); at most as many as slots.
    threads:
        Threads of the engine.
    repeats:
        Evaluations; the fastest counts.

    Returns
    -------
    dict
        Plain values. ``compute_ms_per_image`` and ``read_ms_per_image`` are core milliseconds: seconds times threads.
        ``peak_mb`` is the growth of the process's resident memory over the evaluation.
    """
    plan = plan_batch(network)
    holder, engine = BatchKeyHolder(plan.public), BatchEngine(plan, threads)
    keys = engine.load_keys(holder.evaluation_keys())
    with tempfile.TemporaryDirectory(prefix="hemacrypt-bench-") as scratch:
        path, sizes = Path(scratch) / "ciphertexts", []
        started = time.perf_counter()
        with path.open("wb") as file:
            for ciphertext in holder.encrypt(images):
                sizes.append(file.write(ciphertext))
        encrypting = time.perf_counter() - started
        resting = _resident()
        best: dict[str, float] = {}
        # The first evaluation is for the compiler, or for reading what it left on disk.
        for number in range(repeats + 1):
            seconds: dict[str, float] = {}
            replies = engine.evaluate(_stored(path, sizes), keys, seconds)
            if number and (not best or sum(seconds.values()) < sum(best.values())):
                best = seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resting
    found = holder.decrypt(replies, len(images))
    clear = np.concatenate([network(part) for part in np.array_split(images, 1 + len(images) // 256)])
    each = 1e3 * threads / len(images)
    return {
        "images": len(images),
        "threads": threads,
        "degree": plan.parameters.degree,
        "levels": [plan.public.input_level, plan.public.output_level],
        "compute_ms_per_image": (best["products"] + best["close"]) * each,
        "products_ms_per_image": best["products"] * each,
        "close_ms_per_image": best["close"] * each,
        "read_ms_per_image": best["read"] * each,
        "encrypt_ms_per_image": encrypting * 1e3 / len(images),
        "estimated_ms_per_image": plan.estimated_ms / len(images),
        "seconds": sum(best.values()),
        "upload_bytes_per_image": sum(sizes) / len(images),
        "reply_bytes_per_image": sum(map(len, replies)) / len(images),
        "peak_mb": peak / 1e6,
        "planned_mb": engine.memory_bytes / 1e6,
        "max_logit_error": float(np.abs(found - clear).max()),
        "logit_error_bound": plan.public.logit_error_bound,
        "disagreements": int((found.argmax(axis=1) != clear.argmax(axis=1)).sum()),
    }


def measure_service(count: int) -> dict[str, Any]:
    """Send a batch of the sample's cells, as often as it takes, to a service, and compare with the clear network.

    Returns
    -------
    dict
        Plain values: seconds of the whole call, milliseconds and bytes of the batch where they went.
    """
    bundle = Bundle.read(bundle_path())
    preprocessing, cells = bundle.manifest.preprocessing, sample()
    pixels = [preprocessing.reduce(read_pixels(cell.path, preprocessing.image_size)) for cell in cells[:count]]
    clear = np.concatenate([bundle.network(preprocessing(image)[None]) for image in pixels])
    which = np.arange(count) % len(pixels)
    with tempfile.TemporaryDirectory(prefix="hemacrypt-bench-") as scratch:
        directory = Path(scratch)
        with (
            running_service(bundle_path(), directory, 1, directory / "log") as target,
            Client(target, bundle.manifest.name, key_directory=directory / "keys") as client,
        ):
            client.prepare()
            started = time.perf_counter()
            answers = client.predict_batch([pixels[number] for number in which])
            seconds = time.perf_counter() - started
    errors = np.abs(np.stack([answer.logits for answer in answers]) - clear[which])
    return {
        "images": count,
        "batches": len({id(answer.size) for answer in answers}),
        "seconds": seconds,
        "ms_of_first_batch": asdict(answers[0].milliseconds),
        "bytes_of_first_batch": asdict(answers[0].size),
        "max_logit_error": float(errors.max()),
        "logit_error_bound": answers[0].error_bound,
        "disagreements": sum(
            answer.index != index for answer, index in zip(answers, clear[which].argmax(axis=1).tolist(), strict=True)
        ),
    }


def _stored(path: Path, sizes: list[int]) -> Iterator[bytes]:
    with path.open("rb") as file:
        for size in sizes:
            yield file.read(size)


def _resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def main(
    name: Annotated[str, typer.Argument(help="mnist, leukaemia or service")],
    images: Annotated[int, typer.Option(min=1)] = 4096,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Measure one of the two networks, or the second through a service, and print what was found."""
    if name == "service":
        typer.echo(json.dumps(measure_service(images), indent=2))
        return
    if name == "mnist":
        network, batch = mnist(), mnist_images(images)
    elif name == "leukaemia":
        network, cells = leukaemia()
        batch = repeated(cells, images)
    else:
        raise typer.BadParameter(f"{name!r} is no network of this benchmark; expected mnist, leukaemia or service")
    typer.echo(json.dumps({"network": name, **measure(network, batch, threads, repeats)}, indent=2))


if __name__ == "__main__":
    typer.run(main)
