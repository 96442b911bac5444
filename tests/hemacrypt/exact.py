"""An exact plan carried out with SEAL's plainest calls, to compare budgets and integers with what is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tenseal.sealapi as seal

from hemacrypt.plan.bfv_batch_plan import BfvBatchLinear, BfvBatchPlan
from hemacrypt.plan.bfv_plan import BfvLinear, BfvPlan, BfvStep, pack_rows, read_rows
from hemacrypt.plan.plan import Parameters, Turn

SealObject = Any


@dataclass
class SealBench:
    """SEAL's objects for one plaintext modulus, every key for the whole chain."""

    parameters: Parameters
    plain_modulus: int
    encoder: SealObject
    evaluator: SealObject
    encryptor: SealObject
    decryptor: SealObject
    galois: SealObject
    relinearisation: SealObject

    @classmethod
    def of(cls, parameters: Parameters, plain_modulus: int, elements: list[int]) -> SealBench:
        """Make a secret key and all evaluation keys."""
        encryption = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
        encryption.set_poly_modulus_degree(parameters.degree)
        primes = (*parameters.data_primes, parameters.special_prime)
        encryption.set_coeff_modulus([seal.Modulus(prime) for prime in primes])
        encryption.set_plain_modulus(seal.Modulus(plain_modulus))
        context = seal.SEALContext(encryption, True, seal.SEC_LEVEL_TYPE.TC128)
        generator = seal.KeyGenerator(context)
        galois, relinearisation = seal.GaloisKeys(), seal.RelinKeys()
        if elements:
            generator.create_galois_keys(elements, galois)
        generator.create_relin_keys(relinearisation)
        public = seal.PublicKey()
        generator.create_public_key(public)
        encryptor = seal.Encryptor(context, public, generator.secret_key())
        decryptor = seal.Decryptor(context, generator.secret_key())
        return cls(
            parameters,
            plain_modulus,
            seal.BatchEncoder(context),
            seal.Evaluator(context),
            encryptor,
            decryptor,
            galois,
            relinearisation,
        )

    def encode(self, rows: npt.NDArray[np.int64]) -> SealObject:
        """Encode integers, shape (2, slots)."""
        plain = seal.Plaintext()
        self.encoder.encode((rows.reshape(-1) % self.plain_modulus).tolist(), plain)
        return plain

    def encrypt(self, rows: npt.NDArray[np.int64]) -> SealObject:
        """Encrypt under the secret key, as hospitals do."""
        ciphertext = seal.Ciphertext()
        self.encryptor.encrypt_symmetric(self.encode(rows), ciphertext)
        return ciphertext

    def decrypt(self, ciphertext: SealObject) -> npt.NDArray[np.int64]:
        """Decrypt to residues from 0 to t - 1, shape (2, slots)."""
        plain = seal.Plaintext()
        self.decryptor.decrypt(ciphertext, plain)
        return np.array(self.encoder.decode_uint64(plain), dtype=np.int64).reshape(2, -1)

    def budget(self, ciphertext: SealObject) -> int:
        """Return the noise budget that SEAL finds with the secret key."""
        return int(self.decryptor.invariant_noise_budget(ciphertext))

    def turned(self, ciphertext: SealObject, turn: Turn) -> SealObject:
        """Apply one automorphism."""
        found = seal.Ciphertext()
        self.evaluator.apply_galois(ciphertext, self.parameters.galois_element(*turn), self.galois, found)
        return found

    def step(self, step: BfvStep, values: list[SealObject], number: int) -> list[SealObject]:
        """Carry out one step, its modulus switches included."""
        outputs = self._linear(step, values) if isinstance(step, BfvLinear) else self._squares(values)
        for output, value in enumerate(outputs):
            for _ in range(step.level - step.next_level):
                self.evaluator.mod_switch_to_next_inplace(value)
            if isinstance(step, BfvLinear):
                self.evaluator.add_plain_inplace(value, self.encode(step.bias[number, output]))
        return outputs

    def _squares(self, values: list[SealObject]) -> list[SealObject]:
        for value in values:
            self.evaluator.square_inplace(value)
            self.evaluator.relinearize_inplace(value, self.relinearisation)
        return values

    def _linear(self, step: BfvLinear, values: list[SealObject]) -> list[SealObject]:
        copies = list(values)
        for copy in step.copies[step.inputs :]:
            copies.append(self.turned(copies[copy.parent], Turn(copy.step)))
        return [self._output(step, giants, copies) for giants in step.giants]

    def _output(self, step: BfvLinear, giants: Any, copies: list[SealObject]) -> SealObject:
        total: SealObject = None
        for index, terms in reversed(list(enumerate(giants))):
            if total is not None and index < len(giants) - 1:
                total = self.turned(total, Turn(step.giant_step))
            for term in terms:
                product = seal.Ciphertext()
                self.evaluator.multiply_plain(copies[term.copy], self.encode(step.diagonals[term.diagonal]), product)
                if total is None:
                    total = product
                else:
                    self.evaluator.add_inplace(total, product)
        for group in step.turns:
            for summand in [self.turned(total, turn) for turn in group]:
                self.evaluator.add_inplace(total, summand)
        return total


def evaluate_batch(
    plan: BfvBatchPlan, images: npt.NDArray[np.float64], number: int
) -> tuple[list[int], npt.NDArray[np.int64]]:
    """Evaluate a batch modulo one of its plaintext moduli; as `evaluate`."""
    public = plan.public
    # Encrypted at the input's level, not switched down to it: that would add a rounding.
    bench = SealBench.of(public.parameters.truncated(public.input_level), public.plain_moduli[number], [])
    packed = zip(public.input_order, public.pack(images), strict=True)
    values = {index: bench.encrypt(rows) for index, rows in packed}
    current, budgets = [values[index] for index in range(public.inputs)], []
    for step in plan.steps:
        if isinstance(step, BfvBatchLinear):
            current = [_sum(bench, step, current, output) for output in range(step.outputs)]
        else:
            for value in current:
                bench.evaluator.square_inplace(value)
        for output, value in enumerate(current):
            if step.relinearise:
                bench.evaluator.relinearize_inplace(value, bench.relinearisation)
            for _ in range(step.level - step.next_level):
                bench.evaluator.mod_switch_to_next_inplace(value)
            if isinstance(step, BfvBatchLinear):
                everywhere = np.full((2, public.parameters.slots), step.bias[number, output])
                bench.evaluator.add_plain_inplace(value, bench.encode(everywhere))
        budgets.append(min(bench.budget(value) for value in current))
    rows = np.stack([bench.decrypt(value) for value in current])
    return budgets, public.unpack(rows, len(images)).astype(np.int64)


def _sum(bench: SealBench, step: BfvBatchLinear, values: list[SealObject], output: int) -> SealObject:
    total: SealObject = None
    for entry in np.flatnonzero(step.rows == output):
        product, weight = seal.Ciphertext(), int(step.weights[entry])
        # SEAL multiplies by a negative constant c as by t + c, which is right but for the noise: t times as much.
        bench.evaluator.multiply_plain(values[step.columns[entry]], seal.Plaintext(f"{abs(weight):x}"), product)
        if weight < 0:
            bench.evaluator.negate_inplace(product)
        if total is None:
            total = product
        else:
            bench.evaluator.add_inplace(total, product)
    return total


def elements_of(plan: BfvPlan) -> list[int]:
    """Return every Galois element of a plan, whatever its level."""
    return sorted({element for group in plan.public.keys for element in group.elements})


def evaluate(plan: BfvPlan, images: npt.NDArray[np.float64], number: int) -> tuple[list[int], npt.NDArray[np.int64]]:
    """Evaluate a plan modulo one of its plaintext moduli.

    Returns
    -------
    SEAL's noise budget after each step, that of the worst ciphertext; and the residues of the logits, (images, logits)
    """
    public = plan.public
    bench = SealBench.of(public.parameters, public.plain_moduli[number], elements_of(plan))
    rows = pack_rows(public.input_layout, np.rint(images * public.input_scale))
    values, budgets = [bench.encrypt(row) for row in rows], []
    for step in plan.steps:
        values = bench.step(step, values, number)
        budgets.append(min(bench.budget(value) for value in values))
    copies = read_rows(public.output_layout, np.stack([bench.decrypt(value) for value in values]))
    assert (copies == copies[:, :1]).all()
    return budgets, copies[:, 0].astype(np.int64)
