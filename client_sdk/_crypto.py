"""Key generation, encryption and decryption — all of it SEAL's, and all of it on the hospital's side.

This is the only module of Hemacrypt that ever holds a secret key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal

from hemacrypt.errors import FormatError, PlanError
from hemacrypt.model.network import Array, ComplexArray
from hemacrypt.plan.batch_plan import PublicBatchPlan
from hemacrypt.plan.bfv_batch_plan import PublicBfvBatchPlan
from hemacrypt.plan.bfv_plan import PublicBfvPlan, combine, pack_rows, read_rows
from hemacrypt.plan.plan import KeyGroup, Parameters, PublicPlan
from hemacrypt.seal import format as sealformat
from hemacrypt.seal import io as sealio
from hemacrypt.seal.evaluation_keys import EvaluationKeys, LevelKeys

# A calibration image lies at the guard's limit, and the guard has an error as well; the bound grows with its root.
_GUARD_ROOM = 1.01


class _SecretKey:
    """A secret key, and SEAL's objects that use it."""

    def __init__(self, parameters: Parameters, groups: tuple[KeyGroup, ...], secret: bytes | None) -> None:
        self._parameters, self._groups = parameters, groups
        self._context = sealio.make_context(parameters)
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

    def secret_bytes(self) -> bytes:
        """Serialise the secret key, for a file that only its owner can read."""
        return sealio.dump(self._secret)

    def evaluation_keys(self) -> EvaluationKeys:
        """Generate seeded relinearisation and Galois keys for exactly the plan's operations, level by level."""
        secret, parameters = self.secret_bytes(), self._parameters
        levels: list[LevelKeys] = []
        for group in self._groups:
            context = sealio.make_context(parameters.truncated(group.level))
            cut = sealio.truncated_secret(secret, parameters, group.level)
            generator = seal.KeyGenerator(context, sealio.load(seal.SecretKey(), context, cut))
            relinearisation = sealio.dump(generator.create_relin_keys()) if group.relinearise else b""
            # The binding reads a list of positive integers as Galois elements, which they are.
            galois = sealio.dump(generator.create_galois_keys(list(group.elements))) if group.elements else b""
            levels.append(LevelKeys(relinearisation, galois))
        return EvaluationKeys(tuple(levels))


class KeyHolder(_SecretKey):
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
        super().__init__(plan.parameters, plan.keys, secret)
        self.plan = plan

    def __repr__(self) -> str:
        return f"KeyHolder(model={self.plan.model!r}, degree={self.plan.parameters.degree})"

    def serving(self, plan: PublicPlan) -> KeyHolder:
        """Return a holder of the same secret key for another plan with the same parameters."""
        if plan is self.plan or plan.plan_id == self.plan.plan_id:
            return self
        return KeyHolder(plan, self.secret_bytes())

    def serving_batches(self, plan: PublicBatchPlan) -> BatchKeyHolder:
        """Return a holder of the same secret key for batches, whose plan has the same parameters."""
        return BatchKeyHolder(plan, self.secret_bytes())

    def serving_exact(self, plan: PublicBfvPlan) -> BfvKeyHolder:
        """Return a holder of the same secret key for exact evaluation, whose plan has the same parameters."""
        return BfvKeyHolder(plan, self.secret_bytes())

    def serving_exact_batches(self, plan: PublicBfvBatchPlan) -> BfvBatchKeyHolder:
        """Return a holder of the same secret key for exact batches, whose plan has the same parameters."""
        return BfvBatchKeyHolder(plan, self.secret_bytes())

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
        """Decrypt the service's reply; see `decrypt_bounded`, which tells the error bounds as well."""
        return self.decrypt_bounded(replies)[0]

    def decrypt_bounded(self, replies: Sequence[bytes]) -> tuple[Array, Array]:
        """Decrypt the service's reply.

        Parameters
        ----------
        replies:
            Ciphertexts straight from the wire.

        Returns
        -------
        array of the logits, shape (images, logits), and the bound on the error of each image's logits, shape (images,)

        Raises
        ------
        FormatError
            If the reply is not as many ciphertexts of the plan's last level and output scale as it promises, was not
            computed under this key, or holds logits that do not fit the last modulus; or if the guard says that values
            between the layers were larger than the error bound holds for.
        """
        plan = self.plan
        if len(replies) != plan.output_layout.ciphertexts:
            raise FormatError("reply", f"{len(replies)} ciphertexts; expected {plan.output_layout.ciphertexts}")
        slots = np.stack([self._decrypted(reply) for reply in replies])
        # Under another key, and for most answers that are no evaluation at all, every slot holds something else.
        if max(plan.output_layout.spread(slots), plan.output_layout.rest(slots)) > plan.copy_tolerance:
            raise FormatError(
                "reply", "the copies of a logit disagree; it was not computed from what this key encrypted"
            )
        values = plan.output_layout.unpack(slots)
        if np.abs(values).max() > plan.logit_limit / 2:
            raise FormatError("reply", "a logit is too large for the last modulus; the image is unlike all trained on")
        logits, guards = values[:, : len(plan.labels)], values[:, len(plan.labels) :].sum(axis=1)
        if plan.guards and guards.max() > _GUARD_ROOM * plan.guard_limit:
            raise FormatError(
                "reply",
                "values between the layers are larger than those of all calibration images, so that no error bound "
                "holds; the image is unlike all trained on: check how it was made",
            )
        return logits, plan.error_bounds(guards)

    def _decrypted(self, reply: bytes) -> ComplexArray:
        plan = self.plan
        checked = sealformat.check_ciphertext(reply, plan.parameters, 0, plan.output_scale, self._minor)
        plain = seal.Plaintext()
        self._decryptor.decrypt(sealio.load(seal.Ciphertext(), self._context, checked), plain)
        return np.array(self._encoder.decode_complex(plain))


class BatchKeyHolder(_SecretKey):
    """The same for batches: encrypts up to N / 2 images at once, one ciphertext for each value, and decrypts logits.

    Parameters
    ----------
    plan:
        The public batch plan that everything is for.
    secret:
        A secret key serialised by `secret_bytes`; a new one is generated when there is none.

    Raises
    ------
    PlanError
        If SEAL rejects the plan's parameters.
    FormatError
        If the secret key is for other parameters.
    """

    def __init__(self, plan: PublicBatchPlan, secret: bytes | None = None) -> None:
        super().__init__(plan.parameters, plan.keys, secret)
        self.plan = plan

    def __repr__(self) -> str:
        return f"BatchKeyHolder(model={self.plan.model!r}, degree={self.plan.parameters.degree})"

    def encrypt(self, images: npt.ArrayLike) -> Iterator[bytes]:
        """Encrypt preprocessed images, one ciphertext after the other.

        Parameters
        ----------
        images:
            Shape (images, channels, height, width); at most as many as the plan has slots.

        Yields
        ------
        bytes
            Seeded symmetric ciphertexts in the plan's order, at its input level and scale.

        Raises
        ------
        PlanError
            If the images do not fit the plan or hold numbers that cannot be encrypted.
        """
        plan, slots = self.plan, self.plan.pack(images)
        room = 2.0 ** (plan.parameters.bits_at(plan.input_level) - 2)
        if not np.abs(slots).max() * plan.input_scale < room:
            raise PlanError("the images hold values that are no finite numbers of moderate size; preprocess them first")
        level = sealio.parms_id_words(plan.parameters.parms_id(plan.input_level))
        return (self._encrypt(content, level) for content in slots)

    def _encrypt(self, slots: Array, level: list[int]) -> bytes:
        plain = seal.Plaintext()
        self._encoder.encode(slots.tolist(), level, self.plan.input_scale, plain)
        return sealio.dump(self._encryptor.encrypt_symmetric(plain))

    def decrypt(self, replies: Sequence[bytes], images: int) -> Array:
        """Decrypt the service's replies.

        Parameters
        ----------
        replies:
            Straight from the wire, one for each logit.
        images:
            How many images were in the batch.

        Returns
        -------
        array of the logits, shape (images, logits)

        Raises
        ------
        FormatError
            If there are more or fewer replies than logits, one is no ciphertext of the plan's output level and scale,
            was not computed under this key, or holds logits that do not fit the last modulus.
        """
        plan = self.plan
        if len(replies) != plan.outputs:
            raise FormatError("reply", f"{len(replies)} ciphertexts came; expected {plan.outputs}, one for each logit")
        slots = np.stack([self._decrypt(reply) for reply in replies])
        logits = plan.unpack(slots, images)
        # Under another key every slot holds something else, and most of that is too large.
        if np.abs(slots - logits.T[:, np.arange(plan.images) % images]).max() > 2 * plan.logit_error_bound:
            raise FormatError(
                "reply", "the copies of a logit disagree; it was not computed from what this key encrypted"
            )
        if np.abs(logits).max() > plan.logit_limit / 2:
            raise FormatError("reply", "a logit is too large for the last modulus; the image is unlike all trained on")
        return logits

    def _decrypt(self, reply: bytes) -> Array:
        plan, plain = self.plan, seal.Plaintext()
        checked = sealformat.check_ciphertext(reply, plan.parameters, plan.output_level, plan.output_scale, self._minor)
        self._decryptor.decrypt(sealio.load(seal.Ciphertext(), self._context, checked), plain)
        return np.array(self._encoder.decode_double(plain))


class _Modulus:
    """What encrypts and decrypts under one plaintext modulus: the secret key under that modulus' name."""

    def __init__(self, parameters: Parameters, level: int, plain_modulus: int, secret: bytes) -> None:
        # Fresh ciphertexts have the top level, so a shorter chain makes shorter ones; SEAL's names are the same.
        parameters, secret = parameters.truncated(level), sealio.truncated_secret(secret, parameters, level)
        self._parameters, self._modulus = parameters, plain_modulus
        self._minor = sealio.seal_minor_version()
        self._context = sealio.make_context(parameters, plain_modulus)
        renamed = sealio.truncated_secret(secret, parameters, parameters.top_level, plain_modulus)
        key = sealio.load(seal.SecretKey(), self._context, renamed)
        self._encoder = seal.BatchEncoder(self._context)
        self._encryptor = seal.Encryptor(self._context, key)
        self._decryptor = seal.Decryptor(self._context, key)

    def encrypt(self, rows: npt.NDArray[np.int64]) -> bytes:
        """Encrypt both rows of one ciphertext, shape (2, slots)."""
        plain = sealio.encode_rows(self._encoder, rows, self._modulus)
        return sealio.dump(self._encryptor.encrypt_symmetric(plain))

    def decrypt(self, reply: bytes, level: int) -> npt.NDArray[np.int64]:
        """Check and decrypt a ciphertext from the wire; both rows modulo the plaintext modulus, shape (2, slots)."""
        checked = sealformat.check_ciphertext(reply, self._parameters, level, 1.0, self._minor, self._modulus)
        plain = seal.Plaintext()
        self._decryptor.decrypt(sealio.load(seal.Ciphertext(), self._context, checked), plain)
        return np.array(self._encoder.decode_uint64(plain), dtype=np.int64).reshape(2, -1)


def _combined(
    residues: Sequence[npt.NDArray[np.int64]], plan: PublicBfvPlan | PublicBfvBatchPlan
) -> npt.NDArray[np.object_]:
    """Put residues of logits together, and refuse integers that no valid image makes."""
    logits = combine(residues, plan.plain_moduli)
    if (abs(logits) > plan.largest_logit).any():
        raise FormatError("reply", f"a logit exceeds {plan.largest_logit}, which no valid image can make it do")
    return logits


class BfvKeyHolder(_SecretKey):
    """The same for exact evaluation under BFV, one ciphertext for each plaintext modulus.

    The secret key and the evaluation keys are those of CKKS (see `hemacrypt.plan.bfv_plan`).

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

    def __init__(self, plan: PublicBfvPlan, secret: bytes | None = None) -> None:
        super().__init__(plan.parameters, plan.keys, secret)
        self.plan = plan
        key = self.secret_bytes()
        top = plan.parameters.top_level
        self._moduli = [_Modulus(plan.parameters, top, modulus, key) for modulus in plan.plain_moduli]

    def __repr__(self) -> str:
        return f"BfvKeyHolder(model={self.plan.model!r}, degree={self.plan.parameters.degree})"

    def encrypt(self, images: npt.ArrayLike) -> list[bytes]:
        """Quantise and encrypt preprocessed images, as many as the plan takes at once.

        Parameters
        ----------
        images:
            Shape (channels, height, width) for one, (images, channels, height, width) for several.

        Returns
        -------
        list of bytes
            Seeded symmetric ciphertexts at the plan's top level: all of the first plaintext modulus, then of the next.

        Raises
        ------
        PlanError
            If the images do not fit the plan or hold numbers that are not finite or out of range.
        """
        plan = self.plan
        scaled = np.rint(np.asarray(images, dtype=np.float64) * plan.input_scale)
        smallest, largest = plan.input_range
        if not (scaled.size and smallest <= scaled.min() and scaled.max() <= largest):
            raise PlanError(
                f"the image holds values that are no numbers from {smallest / plan.input_scale:g} to "
                f"{largest / plan.input_scale:g}, for which alone the logits are exact; preprocess it first"
            )
        rows = pack_rows(plan.input_layout, scaled)
        return [modulus.encrypt(content) for modulus in self._moduli for content in rows]

    def decrypt_integers(self, replies: Sequence[bytes]) -> npt.NDArray[np.object_]:
        """Decrypt the service's reply to the integers that the quantised network has for logits.

        Parameters
        ----------
        replies:
            Ciphertexts straight from the wire.

        Returns
        -------
        array of Python integers, shape (images, logits)

        Raises
        ------
        FormatError
            If the reply is not as many ciphertexts of the plan's output level as it promises, was not computed under
            this key, or holds integers that no valid image makes.
        """
        plan = self.plan
        if len(replies) != plan.output_ciphertexts:
            raise FormatError("reply", f"{len(replies)} ciphertexts; expected {plan.output_ciphertexts}")
        each, residues = plan.output_layout.ciphertexts, []
        for number, holder in enumerate(self._moduli):
            mine = replies[number * each : (number + 1) * each]
            residues.append(self._residues(np.stack([holder.decrypt(reply, plan.output_level) for reply in mine])))
        return _combined(residues, plan)

    def decrypt(self, replies: Sequence[bytes]) -> Array:
        """Decrypt the service's reply to logits in the network's units, shape (images, logits); see `decrypt_integers`.

        Exactly the integers of `decrypt_integers`, divided by the plan's output scale.
        """
        logits: Array = (self.decrypt_integers(replies) / self.plan.output_scale).astype(np.float64)
        return logits

    def _residues(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Read logits modulo one plaintext modulus from rows (ciphertexts, 2, slots), shape (images, logits).

        All copies of a logit are equal and no other slot holds anything, or the reply was computed from something else:
        with another key, or too much noise, every slot is a random number.
        """
        layout = self.plan.output_layout
        copies = read_rows(layout, rows)
        used = pack_rows(layout, np.ones((self.plan.images, len(self.plan.labels)))) != 0
        if (copies != copies[:, :1]).any() or rows[~used].any():
            raise FormatError(
                "reply", "the copies of a logit disagree; it was not computed from what this key encrypted"
            )
        found: npt.NDArray[np.int64] = copies[:, 0].astype(np.int64)
        return found


class BfvBatchKeyHolder(_SecretKey):
    """The same for exact batches: up to N images at once, one ciphertext for each value and plaintext modulus.

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

    def __init__(self, plan: PublicBfvBatchPlan, secret: bytes | None = None) -> None:
        super().__init__(plan.parameters, plan.keys, secret)
        self.plan = plan
        key, level = self.secret_bytes(), plan.input_level
        self._moduli = [_Modulus(plan.parameters, level, modulus, key) for modulus in plan.plain_moduli]

    def __repr__(self) -> str:
        return f"BfvBatchKeyHolder(model={self.plan.model!r}, degree={self.plan.parameters.degree})"

    def encrypt(self, images: npt.ArrayLike) -> Iterator[bytes]:
        """Quantise and encrypt preprocessed images, one ciphertext after the other.

        Parameters
        ----------
        images:
            Shape (images, channels, height, width); at most as many as both rows have slots.

        Yields
        ------
        bytes
            Seeded symmetric ciphertexts at the plan's input level: all inputs in the plan's order for the first
            plaintext modulus, then for the next.

        Raises
        ------
        PlanError
            If the images do not fit the plan or hold numbers that cannot be encrypted.
        """
        scaled = np.asarray(images, dtype=np.float64) * self.plan.input_scale
        if scaled.size and not np.abs(scaled).max() < min(math.prod(self.plan.plain_moduli) / 2, 2.0**53):
            raise PlanError("the images hold values that are no finite numbers of moderate size; preprocess them first")
        rows = self.plan.pack(images)
        return (modulus.encrypt(content) for modulus in self._moduli for content in rows)

    def decrypt_integers(self, replies: Sequence[bytes], images: int) -> npt.NDArray[np.object_]:
        """Decrypt the service's replies to the integers that the quantised network has for logits.

        Parameters
        ----------
        replies:
            Straight from the wire.
        images:
            How many images were in the batch.

        Returns
        -------
        array of Python integers, shape (images, logits)

        Raises
        ------
        FormatError
            If there are more or fewer replies than promised, one is no ciphertext of the plan's output level, was not
            computed under this key, or holds integers that no valid image makes.
        """
        plan = self.plan
        if len(replies) != len(self._moduli) * plan.outputs:
            expected = f"{len(self._moduli) * plan.outputs}, one for each logit and plaintext modulus"
            raise FormatError("reply", f"{len(replies)} ciphertexts came; expected {expected}")
        residues = []
        for number, holder in enumerate(self._moduli):
            mine = replies[number * plan.outputs : (number + 1) * plan.outputs]
            slots = np.stack([holder.decrypt(reply, plan.output_level).reshape(-1) for reply in mine])
            if (slots != slots[:, np.arange(plan.images) % images]).any():
                raise FormatError(
                    "reply", "the copies of a logit disagree; it was not computed from what this key encrypted"
                )
            residues.append(slots[:, :images].T)
        # With a full batch there are no copies: then it is the size that tells, for under another key it is random.
        return _combined(residues, plan)

    def decrypt(self, replies: Sequence[bytes], images: int) -> Array:
        """Decrypt the service's replies to logits in the network's units, shape (images, logits)."""
        logits: Array = (self.decrypt_integers(replies, images) / self.plan.output_scale).astype(np.float64)
        return logits
