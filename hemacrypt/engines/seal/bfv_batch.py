"""The reference for exact batches: SEAL, one value in each ciphertext, values forgotten as soon as they were used.

A weight is a constant polynomial, which SEAL multiplies by without any transform. An output is complete when the last
input that it depends on has come; it is then squared, and is itself an input of the next layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import tenseal.sealapi as seal

from hemacrypt.engines.seal.bfv import Bridge
from hemacrypt.engines.seal.ckks import SealKeys, load_keys
from hemacrypt.errors import FormatError, PlanError
from hemacrypt.plan.bfv_batch_plan import BfvBatchLinear, BfvBatchPlan
from hemacrypt.seal import io as sealio
from hemacrypt.seal.evaluation_keys import EvaluationKeys
from hemacrypt.seal.io import Context, SealObject


class BfvBatchSealEngine:
    """Evaluates exact batches with SEAL on one core.

    Parameters
    ----------
    plan:
        The plan, weights included.

    Raises
    ------
    PlanError
        If an output has only weights that are zero modulo a plaintext modulus.
    """

    name: ClassVar[str] = "seal"

    def __init__(self, plan: BfvBatchPlan) -> None:
        self.plan = plan
        parameters = plan.parameters
        levels = {parameters.top_level, *(step.level for step in plan.steps)}
        self._contexts = {level: sealio.make_context(parameters.truncated(level)) for level in levels}
        self._moduli = [_Modulus(plan, number, self._contexts) for number in range(len(plan.public.plain_moduli))]

    def load_keys(self, keys: EvaluationKeys) -> SealKeys:
        """Check and load a client's evaluation keys; see `hemacrypt.engines.base.BaseEngine.load_keys`."""
        return load_keys(keys, self.plan.public, self._contexts)

    def evaluate(self, ciphertexts: Iterable[bytes], keys: SealKeys) -> list[bytes]:
        """Evaluate the network on a batch; see `hemacrypt.engines.vector.bfv_batch.BfvBatchEngine.evaluate`."""
        public, arriving, replies = self.plan.public, iter(ciphertexts), list[bytes]()
        for modulus in self._moduli:
            run = _Evaluation(self.plan, modulus, keys)
            for done, number in enumerate(public.input_order):
                content = next(arriving, None)
                if content is None:
                    raise FormatError(
                        "ciphertexts", f"{done} came; expected {public.inputs}, one for each value of each modulus"
                    )
                run.arrive(0, number, modulus.bridge.load(content, public.input_level))
            replies += [sealio.dump(run.logits[number]) for number in range(public.outputs)]
        if next(arriving, None) is not None:
            raise FormatError("ciphertexts", f"more came than {public.inputs} for each modulus; send no others")
        return replies


class _Modulus:
    """The network modulo one of the plaintext moduli, sorted by columns.

    Attributes
    ----------
    columns:
        For each affine map and each input, the outputs that it contributes to and the weights.
    waiting:
        For each affine map, how many inputs each output waits for.
    biases:
        For each affine map, plaintexts.
    """

    def __init__(self, plan: BfvBatchPlan, number: int, contexts: dict[int, Context]) -> None:
        self.bridge = Bridge(plan.parameters, plan.public.plain_moduli[number], contexts)
        self.columns = [self._columns(linear) for linear in plan.linears]
        self.waiting = [
            np.bincount([row for column in columns for row, _ in column], minlength=linear.outputs)
            for columns, linear in zip(self.columns, plan.linears, strict=True)
        ]
        for linear, waiting in zip(plan.linears, self.waiting, strict=True):
            if not waiting.all():
                raise PlanError(
                    f"{linear.name}: all weights of output {int(np.argmin(waiting))} are zero modulo "
                    f"{self.bridge.modulus}; remove it, or choose another plaintext modulus"
                )
        self.biases = [[self.constant(bias) for bias in linear.bias[number].tolist()] for linear in plan.linears]

    def constant(self, value: int) -> SealObject:
        """Return a plaintext with the same integer in all slots: a constant polynomial, hexadecimal."""
        return seal.Plaintext(f"{value % self.bridge.modulus:X}")

    def _columns(self, linear: BfvBatchLinear) -> list[list[tuple[int, int]]]:
        columns: list[list[tuple[int, int]]] = [[] for _ in range(linear.inputs)]
        entries = zip(linear.rows.tolist(), linear.columns.tolist(), linear.weights.tolist(), strict=True)
        for row, column, weight in entries:
            # SEAL refuses a product with zero as transparent.
            if weight % self.bridge.modulus:
                columns[column].append((row, weight))
        return columns


class _Evaluation:
    """The open sums of one evaluation.

    Attributes
    ----------
    logits:
        Those that are complete, by number.
    """

    def __init__(self, plan: BfvBatchPlan, modulus: _Modulus, keys: SealKeys) -> None:
        self._plan, self._modulus, self._bridge, self._keys = plan, modulus, modulus.bridge, keys
        self._sums: list[dict[int, SealObject]] = [{} for _ in plan.linears]
        self._waiting = [waiting.copy() for waiting in modulus.waiting]
        self.logits: dict[int, SealObject] = {}

    def arrive(self, layer: int, number: int, value: SealObject) -> None:
        """Use input ``number`` of an affine map, a ciphertext of coefficients, and send on what is complete now."""
        sums, waiting, evaluator = self._sums[layer], self._waiting[layer], self._bridge.evaluator
        for row, weight in self._modulus.columns[layer][number]:
            product = seal.Ciphertext()
            # By the absolute weight: for t - w SEAL multiplies by that large number, and the noise with it.
            evaluator.multiply_plain(value, self._modulus.constant(abs(weight)), product)
            if row not in sums:
                sums[row] = product
                if weight < 0:
                    evaluator.negate_inplace(product)
            elif weight < 0:
                evaluator.sub_inplace(sums[row], product)
            else:
                evaluator.add_inplace(sums[row], product)
            waiting[row] -= 1
            if not waiting[row]:
                self._complete(layer, row, sums.pop(row))

    def _complete(self, layer: int, row: int, total: SealObject) -> None:
        linear, bridge = self._plan.linears[layer], self._bridge
        if linear.relinearise:
            total = bridge.relinearise(total, linear.level, linear.level, self._keys)
        total = self._switched(total, linear.level, linear.next_level)
        bridge.evaluator.add_plain_inplace(total, self._modulus.biases[layer][row])
        if layer + 1 == len(self._plan.linears):
            self.logits[row] = total
            return
        step = self._plan.squares[layer]
        total = bridge.square(total, step.level)
        if step.relinearise:
            total = bridge.relinearise(total, step.level, step.level, self._keys)
        self.arrive(layer + 1, row, self._switched(total, step.level, step.next_level))

    def _switched(self, value: SealObject, level: int, next_level: int) -> SealObject:
        """Return a ciphertext as coefficients, switched down."""
        value = self._bridge.from_ntt(value, level)
        for _ in range(level - next_level):
            self._bridge.evaluator.mod_switch_to_next_inplace(value)
        return value
