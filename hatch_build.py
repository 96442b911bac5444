"""Generates the protobuf code while the distribution is built or installed, so that it is never edited by hand.

Also a command: ``python hatch_build.py --check`` fails when the generated code is missing or stale.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import resources, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
PROTO = "hemacrypt/v1/inference.proto"
GENERATED = ("inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py")


def generate(target: Path) -> None:
    """Run protoc into a directory.

    Raises
    ------
    RuntimeError
        If the contract does not compile.
    """
    include = resources.files("grpc_tools") / "_proto"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    # A process of its own: protoc crashes in one that has loaded TensorFlow, whose protobuf is another.
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", f"-I{include}", *outputs, PROTO]
    if subprocess.run(command).returncode != 0:
        raise RuntimeError(f"protoc could not compile proto/{PROTO}")


def stale() -> list[str]:
    """Return which generated files differ from what the contract gives now."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh, present = Path(scratch, "hemacrypt", "v1"), ROOT / "hemacrypt" / "v1"
        return [
            name
            for name in GENERATED
            if not (present / name).is_file() or (present / name).read_text() != (fresh / name).read_text()
        ]


# As a command this file runs in environments without the build backend; then there is no hook to define.
if util.find_spec("hatchling"):
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class ProtobufBuildHook(BuildHookInterface[Any]):
        """Hatchling's hook: generate before anything is packed, for wheels and for editable installs."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Generate the code into the source tree."""
            generate(ROOT)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        generate(ROOT)
    elif found := stale():
        sys.exit(f"stale or missing: {', '.join(found)}; run `python hatch_build.py` and try again")
