"""What the training tests share: TensorFlow, a small release on disk, small arrays, the shared data."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

# Before the import: no start-up chatter, no search for an accelerator, one thread.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
with warnings.catch_warnings():
    # TensorFlow and what it imports use deprecated names of NumPy and protobuf; ours stay errors.
    warnings.simplefilter("ignore")
    import tensorflow  # noqa: F401

# Keras 3 on TensorFlow hands its variables to NumPy 2 through an __array__ without the copy keyword.
KERAS_ON_NUMPY_2 = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"

Pixels = npt.NDArray[np.uint8]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let that one warning pass, here alone."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings(KERAS_ON_NUMPY_2))


def cell_pixels(seed: int, size: int = 450) -> Pixels:
    """Return a disc of random size and colour on black, uint8, shape (size, size, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - size // 2
    inside = (x * x + y * y < (size * rng.uniform(0.15, 0.35)) ** 2)[..., None]
    colour = rng.integers(60, 200, 3)
    return np.where(inside, np.clip(colour + rng.normal(0, 12, (size, size, 3)), 1, 255), 0).astype(np.uint8)


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a release with the folder names of a typical download.

    Subjects 3 and 9 share an image; H2 has one image twice; 14 and H1 are held out; the preliminary test shows one
    image of subject 4 again, as subject 60, in a file with other bytes.
    """
    root = tmp_path_factory.mktemp("release")

    def put(folder: str, name: str, seed: int, **options: object) -> None:
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(cell_pixels(seed)).save(path, **options)

    put("C-NMC_Leukemia/training_data/fold_0/all", "UID_3_1_1_all.bmp", 1)
    put("C-NMC_Leukemia/training_data/fold_0/all", "UID_4_1_1_all.bmp", 2)
    put("C-NMC_Leukemia/training_data/fold_0/all", "UID_14_1_1_all.bmp", 3)
    put("C-NMC_Leukemia/training_data/fold_0/hem", "UID_H2_1_1_hem.bmp", 4)
    put("C-NMC_Leukemia/training_data/fold_1/hem", "UID_H2_2_1_hem.bmp", 4)
    put("C-NMC_Leukemia/training_data/fold_1/hem", "UID_H1_1_1_hem.bmp", 5)
    put("C-NMC_Leukemia/training_data/fold_2/fold_2/all", "UID_9_1_1_all.bmp", 1)
    put("C-NMC_Leukemia/training_data/fold_2/fold_2/all", "UID_9_2_1_all.bmp", 6)
    prelim = "C-NMC_Leukemia/C-NMC_test_prelim_phase_data/C-NMC_test_prelim_phase_data"
    put(prelim, "1.bmp", 2, dpi=(300, 300))
    put(prelim, "2.bmp", 7)
    put("C-NMC_Leukemia/C-NMC_test_final_phase_data", "1.bmp", 8)
    with (root / prelim / ".." / "C-NMC_test_prelim_phase_data_labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Patient_ID", "new_names", "labels"])
        table.writerow(["UID_60_1_1_all.bmp", "1.bmp", "1"])
        table.writerow(["UID_H31_1_1_hem.bmp", "2.bmp", "0"])
    return root


@pytest.fixture(scope="session")
def write_arrays() -> Callable[[Path, int], Path]:
    """Writer of ``cnmc_32.npz`` with ``n`` cells whose colour tells the label; 18 subjects, two of them held out."""

    def write(folder: Path, n: int) -> Path:
        rng = np.random.default_rng(0)
        labels = (np.arange(n) % 2).astype(np.uint8)
        subjects = np.array(
            [f"{'' if y else 'H'}{(14, 2, 3, 4, 6, 8, 9, 10, 12)[i // 2 % 9]}" for i, y in enumerate(labels)]
        )
        subjects[subjects == "H14"] = "H1"
        y, x = np.mgrid[:32, :32] - 15.5
        images = np.zeros((n, 32, 32, 3), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            inside = x * x + y * y < rng.uniform(60, 160)
            image[inside] = np.clip(rng.normal((110, 60 + 50 * label, 140), 20, (inside.sum(), 3)), 0, 255)
        np.savez(
            folder / "cnmc_32.npz",
            images=images,
            labels=labels,
            subjects=subjects,
            groups=subjects,
            files=np.array([f"{i}.bmp" for i in range(n)]),
            splits=np.array(["fold_0"] * n),
            sha256=np.array([f"{i:064x}" for i in range(n)]),
        )
        return folder

    return write


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory, write_arrays: Callable[[Path, int], Path]) -> Path:
    """Make a folder with 240 cells as prepared arrays."""
    return write_arrays(tmp_path_factory.mktemp("arrays"), 240)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Find the prepared C-NMC data, or skip with areason that says what is missing."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("HEMACRYPT_DATA", beside))
    if not (folder / "cnmc_32.npz").is_file():
        pytest.skip(f"no cnmc_32.npz in {folder}; set HEMACRYPT_DATA to the folder of the prepared data")
    return folder
