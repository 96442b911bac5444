"""The key directory: a secret key that only its owner can read, and the public keys that were made with it.

::

    secret.key         SEAL's serialisation, mode 0600, in a directory of mode 0700
    evaluation.keys    what is registered with the service
    keys.json          what they were made for, and the name of the key set
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from client_sdk._crypto import KeyHolder
from client_sdk._exceptions import KeysMissingError
from hemacrypt.errors import FormatError
from hemacrypt.plan.plan import PublicPlan
from hemacrypt.seal import format as sealformat
from hemacrypt.seal.evaluation_keys import key_set_id

_SECRET, _EVALUATION, _INFO = "secret.key", "evaluation.keys", "keys.json"


@dataclass(frozen=True)
class KeyInfo:
    """What a key directory's keys are for."""

    model: str
    requirements_id: str
    key_set_id: str
    secret_sha256: str


class KeyDirectory:
    """Keys for one plan below one directory.

    Parameters
    ----------
    path:
        The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, plan: PublicPlan, *, replace: bool = False) -> KeyHolder:
        """Generate keys and store them.

        Parameters
        ----------
        plan:
            What the keys are for.
        replace:
            Whether keys that are there already may be lost.

        Raises
        ------
        KeysMissingError
            If there are keys already and they may not be replaced.
        """
        if self.exists and not replace:
            raise KeysMissingError(
                f"{self.path} holds keys already; name another directory or replace them (--replace)"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise KeysMissingError(f"{self.path} cannot hold keys ({error.strerror}); name another directory") from None
        holder = KeyHolder(plan)
        blob = holder.evaluation_keys().to_bytes()
        secret = holder.secret_bytes()
        info = KeyInfo(plan.model, plan.requirements_id, key_set_id(blob), hashlib.sha256(secret).hexdigest())
        # keys.json is written last: a directory without it has no usable keys, so a crash leaves no mixture.
        (self.path / _INFO).unlink(missing_ok=True)
        _write_private(self.path / _SECRET, secret)
        _write_private(self.path / _EVALUATION, blob)
        _write_private(self.path / _INFO, json.dumps(asdict(info), indent=2).encode())
        return holder

    @property
    def exists(self) -> bool:
        """Whether there is anything that looks like keys; `open` tells whether it is usable."""
        return (self.path / _SECRET).exists() or (self.path / _INFO).exists()

    def info(self) -> KeyInfo:
        """Return what the keys are for.

        Raises
        ------
        KeysMissingError
            If there are none.
        """
        try:
            content = json.loads((self.path / _INFO).read_text(encoding="utf-8"))
            return KeyInfo(**content)
        except (OSError, ValueError, TypeError):
            if self.exists:
                text = f"the keys in {self.path} are incomplete; make new ones with `hemacrypt keygen --replace`"
            else:
                text = f"{self.path} holds no keys; make some with `hemacrypt keygen`"
            raise KeysMissingError(text) from None

    def info_for(self, plan: PublicPlan) -> KeyInfo:
        """Return what the keys are for, after making sure that they serve a plan.

        Raises
        ------
        KeysMissingError
            If there are none, or they are for other parameters.
        """
        info = self.info()
        if info.requirements_id != plan.requirements_id:
            raise KeysMissingError(
                f"the keys in {self.path} are for other parameters (model {info.model}); "
                f"make new ones for {plan.model} with `hemacrypt keygen --replace`"
            )
        return info

    def open(self, plan: PublicPlan) -> KeyHolder:
        """Load the secret key.

        Raises
        ------
        KeysMissingError
            If there is none, others may read it, it is damaged, or it is for another plan.
        """
        info = self.info_for(plan)
        path = self.path / _SECRET
        try:
            mode = path.stat().st_mode & 0o777
            secret = path.read_bytes()
        except OSError as error:
            raise KeysMissingError(f"{path} cannot be read ({error.strerror}); restore it or make new keys") from None
        if mode & 0o077:
            raise KeysMissingError(f"{path} can be read by others (mode {mode:o}); run `chmod 600 {path}`")
        if hashlib.sha256(secret).hexdigest() != info.secret_sha256:
            raise KeysMissingError(f"{path} is damaged; restore it from a backup or make new keys")
        try:
            sealformat.unwrap(secret, 1 << 24, "secret key")
            return KeyHolder(plan, secret)
        except FormatError:
            raise KeysMissingError(f"{path} is damaged; restore it from a backup or make new keys") from None

    def evaluation_blob(self) -> bytes:
        """Return the evaluation keys as they are registered.

        Raises
        ------
        KeysMissingError
            If they are missing or were changed.
        """
        info = self.info()
        try:
            blob = (self.path / _EVALUATION).read_bytes()
        except OSError:
            blob = b""
        if key_set_id(blob) != info.key_set_id:
            raise KeysMissingError(f"{self.path / _EVALUATION} is missing or changed; make new keys with --replace")
        return blob


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that nobody else can read, whole or not at all."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    scratch.rename(path)
