"""The wire contract: generated code is fresh, and everything in it is explained."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

ROOT = Path(__file__).parents[1]
PROTO = "hemacrypt/v1/inference.proto"

# Field numbers of descriptor.proto: how a location names its place.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS, _NESTED, _NESTED_ENUMS, _ONEOFS = 2, 3, 4, 8
_VALUES, _METHODS = 2, 2


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _described(proto: Path, directory: Path) -> FileDescriptorProto:
    include = resources.files("grpc_tools") / "_proto"
    target = directory / "contract.pb"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{proto}", f"-I{include}", "--include_source_info"]
    subprocess.run([*command, f"--descriptor_set_out={target}", PROTO], check=True, capture_output=True)
    (described,) = FileDescriptorSet.FromString(target.read_bytes()).file
    return described


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorProto:
    return _described(ROOT / "proto", tmp_path_factory.mktemp("contract"))


def test_the_generated_code_is_fresh(build: ModuleType) -> None:
    assert build.stale() == []


def test_stale_and_missing_code_is_noticed(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = (ROOT / "proto" / PROTO).read_text(encoding="utf-8")
    copy = tmp_path / "proto" / PROTO
    copy.parent.mkdir(parents=True)
    copy.write_text(contract, encoding="utf-8")
    (tmp_path / "hemacrypt" / "v1").mkdir(parents=True)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.stale() == list(build.GENERATED)
    build.generate(tmp_path)
    assert build.stale() == []
    copy.write_text(contract.replace("message ListModelsRequest {}", "message ListModelsRequest { bool all = 1; }"))
    assert set(build.stale()) == {"inference_pb2.py", "inference_pb2.pyi"}


def test_a_contract_that_does_not_compile_stops_the_build(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "proto" / PROTO
    copy.parent.mkdir(parents=True)
    copy.write_text("message {", encoding="utf-8")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="could not compile"):
        build.generate(tmp_path)


def _in_enum(path: tuple[int, ...], enum: EnumDescriptorProto, name: str) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, name
    for number, value in enumerate(enum.value):
        yield (*path, _VALUES, number), f"{name}.{value.name}"


def _in_message(path: tuple[int, ...], message: DescriptorProto, name: str) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, name
    for number, field in enumerate(message.field):
        yield (*path, _FIELDS, number), f"{name}.{field.name}"
    for number, choice in enumerate(message.oneof_decl):
        yield (*path, _ONEOFS, number), f"{name}.{choice.name}"
    for number, enum in enumerate(message.enum_type):
        yield from _in_enum((*path, _NESTED_ENUMS, number), enum, f"{name}.{enum.name}")
    for number, nested in enumerate(message.nested_type):
        yield from _in_message((*path, _NESTED, number), nested, f"{name}.{nested.name}")


def _everything(contract: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """Return the place and name of every message, field, choice, enum, value, service and method."""
    found: dict[tuple[int, ...], str] = {}
    for number, message in enumerate(contract.message_type):
        found |= dict(_in_message((_MESSAGES, number), message, message.name))
    for number, enum in enumerate(contract.enum_type):
        found |= dict(_in_enum((_ENUMS, number), enum, enum.name))
    for number, service in enumerate(contract.service):
        found[_SERVICES, number] = service.name
        for place, method in enumerate(service.method):
            found[_SERVICES, number, _METHODS, place] = f"{service.name}.{method.name}"
    return found


def _uncommented(contract: FileDescriptorProto) -> list[str]:
    comments = {
        tuple(location.path): location.leading_comments + location.trailing_comments
        for location in contract.source_code_info.location
    }
    return sorted(name for path, name in _everything(contract).items() if not comments.get(path, "").strip())


def test_everything_is_explained(contract: FileDescriptorProto) -> None:
    names = set(_everything(contract).values())
    assert {"PublicPlan", "PublicPlan.labels", "EncryptedInference.Predict", "KeySetState.KEY_SET_STATE_READY"} <= names
    assert len(names) > 60
    assert _uncommented(contract) == []


def test_a_missing_explanation_is_noticed(tmp_path: Path) -> None:
    text = (ROOT / "proto" / PROTO).read_text(encoding="utf-8")
    shorter = text.replace("  // Bytes that have arrived.\n", "").replace("  // Never sent.\n", "")
    assert shorter != text
    copy = tmp_path / "proto" / PROTO
    copy.parent.mkdir(parents=True)
    copy.write_text(shorter, encoding="utf-8")
    assert _uncommented(_described(tmp_path / "proto", tmp_path)) == [
        "GetKeySetResponse.received_bytes",
        "KeySetState.KEY_SET_STATE_UNSPECIFIED",
    ]


def test_an_enum_says_unspecified_when_nothing_was_said(contract: FileDescriptorProto) -> None:
    for enum in contract.enum_type:
        assert (enum.value[0].number, enum.value[0].name.endswith("_UNSPECIFIED")) == (0, True)


def test_the_contract_stands_alone(contract: FileDescriptorProto) -> None:
    """Plain proto3 without imports, extensions or maps: a client can be generated in any language."""
    assert contract.syntax == "proto3"
    assert list(contract.dependency) == []
    assert contract.package == "hemacrypt.v1"
    for message in contract.message_type:
        assert list(message.nested_type) == []
        for field in message.field:
            assert field.type != FieldDescriptorProto.TYPE_GROUP


def test_the_generated_module_is_what_was_described(contract: FileDescriptorProto) -> None:
    from hemacrypt.v1 import inference_pb2

    loaded = FileDescriptorProto()
    inference_pb2.DESCRIPTOR.CopyToProto(loaded)
    plain = FileDescriptorProto()
    plain.CopyFrom(contract)
    plain.ClearField("source_code_info")
    for message in plain.message_type:
        for field in message.field:
            field.ClearField("json_name")
    assert loaded == plain
