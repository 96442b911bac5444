"""Key generation, encryption and decryption — all of it SEAL's, and all of it on the hospital's side.

This is the only module of Hemacrypt that ever holds a secret key.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal

from hemacrypt import sealformat, sealio
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.evaluation_keys import EvaluationKeys
from hemacrypt.network import Array
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

    def secret_bytes(self) -> bytes:
        """Serialise the secret key, for a file that only its owner can read."""
        return sealio.dump(self._secret)

    def evaluation_keys(self) -> EvaluationKeys:
        """Generate seeded relinearisation and Galois keys for exactly the plan's operations."""
        parameters = self.plan.parameters
        relinearisation = galois = b""
        if self.plan.needs_relinearisation:
            relinearisation = sealio.dump(self._generator.create_relin_keys())
        if self.plan.rotation_steps:
            # Galois elements, not steps: the binding reads a list of positive integers as elements.
            elements = [parameters.galois_element(step) for step in self.plan.rotation_steps]
            galois = sealio.dump(self._generator.create_galois_keys(elements))
        return EvaluationKeys(relinearisation, galois)

    def encrypt(self, image: npt.ArrayLike) -> bytes:
        """Encrypt one preprocessed image.

        Parameters
        ----------
        image:
            Shape (channels, height, width).

        Returns
        -------
        bytes
            A seeded symmetric ciphertext at the plan's top level and input scale.
        """
        plain, slots = seal.Plaintext(), self.plan.input_layout.pack(image)
        room = 2.0 ** (self.plan.parameters.bits_at(self.plan.parameters.top_level) - 2)
        if not np.abs(slots).max() * self.plan.input_scale < room:
            raise PlanError("the image holds values that are no finite numbers of moderate size; preprocess it first")
        self._encoder.encode(slots.tolist(), self.plan.input_scale, plain)
        return sealio.dump(self._encryptor.encrypt_symmetric(plain))

    def decrypt(self, reply: bytes) -> Array:
        """Decrypt the service's reply.

        Parameters
        ----------
        reply:
            Straight from the wire.

        Returns
        -------
        array of the logits, shape (logits,)

        Raises
        ------
        FormatError
            If the reply is not a ciphertext of the plan's last level and output scale, was not computed under this
            key, or holds logits that do not fit the last modulus.
        """
        plan = self.plan
        checked = sealformat.check_ciphertext(reply, plan.parameters, 0, plan.output_scale, self._minor)
        plain = seal.Plaintext()
        self._decryptor.decrypt(sealio.load(seal.Ciphertext(), self._context, checked), plain)
        slots = np.array(self._encoder.decode_double(plain))
        # Under another key, and for most answers that are no evaluation at all, every slot holds something else.
        if plan.output_layout.spread(slots) > plan.copy_tolerance:
            raise FormatError(
                "reply", "the copies of a logit disagree; it was not computed from what this key encrypted"
            )
        logits = plan.output_layout.unpack(slots)
        if np.abs(logits).max() > plan.logit_limit / 2:
            raise FormatError("reply", "a logit is too large for the last modulus; the image is unlike all trained on")
        return logits
