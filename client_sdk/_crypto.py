"""Key generation, encryption and decryption — all of it SEAL's, and all of it on the hospital's side.

This is the only module of Hemacrypt that ever holds a secret key.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal

from hemacrypt import sealformat, sealio
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.evaluation_keys import EvaluationKeys, LevelKeys
from hemacrypt.network import Array, ComplexArray
from hemacrypt.plan import PublicPlan


class KeyHolder:
    """A secret key and what it can do: make evaluation keys, encrypt images, decrypt logits.

    Parameters
    ----------
    plan:
        The public plan that everything is for.
    secret:
        A secret key serialised by `secret_bytes`; a new one is generated when there is none.

    Raises
    ------
    PlanError
        If SEAL rejects the plan's parameters.
    FormatError
        If the secret key is for other parameters.
    """

    def __init__(self, plan: PublicPlan, secret: bytes | None = None) -> None:
        self.plan = plan
        self._context = sealio.make_context(plan.parameters)
        self._minor = sealio.seal_minor_version()
        if secret is None:
            self._generator = seal.KeyGenerator(self._context)
        else:
            key = sealio.load(seal.SecretKey(), self._context, secret)
            self._generator = seal.KeyGenerator(self._context, key)
        self._secret = self._generator.secret_key()
        self._encoder = seal.CKKSEncoder(self._context)
        self._encryptor = seal.Encryptor(self._context, self._secret)
        self._decryptor = seal.Decryptor(self._context, self._secret)

    def __repr__(self) -> str:
        return f"KeyHolder(model={self.plan.model!r}, degree={self.plan.parameters.degree})"

    def serving(self, plan: PublicPlan) -> KeyHolder:
        """Return a holder of the same secret key for another plan with the same parameters."""
        if plan is self.plan or plan.plan_id == self.plan.plan_id:
            return self
        return KeyHolder(plan, self.secret_bytes())

    def secret_bytes(self) -> bytes:
        """Serialise the secret key, for a file that only its owner can read."""
        return sealio.dump(self._secret)

    def evaluation_keys(self) -> EvaluationKeys:
        """Generate seeded relinearisation and Galois keys for exactly the plan's operations, level by level."""
        secret, parameters = self.secret_bytes(), self.plan.parameters
        levels: list[LevelKeys] = []
        for group in self.plan.keys:
            context = sealio.make_context(parameters.truncated(group.level))
            cut = sealio.truncated_secret(secret, parameters, group.level)
            generator = seal.KeyGenerator(context, sealio.load(seal.SecretKey(), context, cut))
            relinearisation = sealio.dump(generator.create_relin_keys()) if group.relinearise else b""
            # The binding reads a list of positive integers as Galois elements, which they are.
            galois = sealio.dump(generator.create_galois_keys(list(group.elements))) if group.elements else b""
            levels.append(LevelKeys(relinearisation, galois))
        return EvaluationKeys(tuple(levels))

    def encrypt(self, images: npt.ArrayLike) -> list[bytes]:
        """Encrypt preprocessed images, as many as the plan takes at once.

        Parameters
        ----------
        images:
            Shape (channels, height, width) for one, (images, channels, height, width) for several.

        Returns
        -------
        list of bytes
            Seeded symmetric ciphertexts at the plan's top level and input scale, as many as the input layout has.
        """
        slots = self.plan.input_layout.pack(images)
        room = 2.0 ** (self.plan.parameters.bits_at(self.plan.parameters.top_level) - 2)
        if not np.abs(slots).max() * self.plan.input_scale < room:
            raise PlanError("the image holds values that are no finite numbers of moderate size; preprocess it first")
        return [self._encrypted(content) for content in slots]

    def _encrypted(self, slots: ComplexArray) -> bytes:
        plain = seal.Plaintext()
        self._encoder.encode(slots.tolist(), self.plan.input_scale, plain)
        return sealio.dump(self._encryptor.encrypt_symmetric(plain))

    def decrypt(self, replies: Sequence[bytes]) -> Array:
        """Decrypt the service's reply.

        Parameters
        ----------
        replies:
            Ciphertexts straight from the wire.

        Returns
        -------
        array of the logits, shape (images, logits)

        Raises
        ------
        FormatError
            If the reply is not as many ciphertexts of the plan's last level and output scale as it promises, was not
            computed under this key, or holds logits that do not fit the last modulus.
        """
        plan = self.plan
        if len(replies) != plan.output_layout.ciphertexts:
            raise FormatError("reply", f"{len(replies)} ciphertexts; expected {plan.output_layout.ciphertexts}")
        slots = np.stack([self._decrypted(reply) for reply in replies])
        # Under another key, and for most answers that are no evaluation at all, every slot holds something else.
        if plan.output_layout.spread(slots) > plan.copy_tolerance:
            raise FormatError(
                "reply", "the copies of a logit disagree; it was not computed from what this key encrypted"
            )
        logits = plan.output_layout.unpack(slots)
        if np.abs(logits).max() > plan.logit_limit / 2:
            raise FormatError("reply", "a logit is too large for the last modulus; the image is unlike all trained on")
        return logits

    def _decrypted(self, reply: bytes) -> ComplexArray:
        plan = self.plan
        checked = sealformat.check_ciphertext(reply, plan.parameters, 0, plan.output_scale, self._minor)
        plain = seal.Plaintext()
        self._decryptor.decrypt(sealio.load(seal.Ciphertext(), self._context, checked), plain)
        return np.array(self._encoder.decode_complex(plain))
