"""The guard: one more output that tells how large the values before the last square were.

Squares make a network blow up on images that are unlike all it was calibrated on: errors grow with the values, and
values that outgrow a modulus come out as others. Whoever encrypts sees logits only. So the last affine map gets one
more row: the sum of the squares that it reads, the *energy* of the last hidden layer. The client refuses an answer
whose energy is larger than the measured magnitudes allow, and knows how much of the error bound an image uses: the
error of a logit grows with the root of the energy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from hemacrypt.model.network import CollapsedNetwork, Dense

# A last convolution becomes a matrix to take one row more; not beyond this size.
_LARGEST_MATRIX: Final = 1 << 22


def guarded(network: CollapsedNetwork) -> tuple[CollapsedNetwork, float]:
    """Add the guard to a network, behind its logits.

    Parameters
    ----------
    network:
        Any network. Without a square, or without measured magnitudes, there is nothing to guard.

    Returns
    -------
    network with one output more, and the value of that output at the largest energy that is allowed; the network itself
    and 0 where there is no guard
    """
    if network.magnitudes is None or network.squares == 0:
        return network, 0.0
    last, hidden, logits = network.linears[-1], network.magnitudes[-2], network.magnitudes[-1]
    energy, limit = float((hidden**2).sum()), float(logits.max())
    if energy == 0 or limit == 0 or last.inputs * last.outputs > _LARGEST_MATRIX:
        return network, 0.0
    weight = np.zeros((last.outputs + 1, last.inputs))
    rows, columns, values = last.entries()
    weight[rows, columns] = values
    # As large as a logit at the limit, so that the guard costs the logits no precision.
    weight[-1] = limit / energy
    wider = Dense(weight, np.append(last.offset(), 0.0))
    magnitudes = (*network.magnitudes[:-1], np.append(logits, limit))
    return replace(network, linears=(*network.linears[:-1], wider), magnitudes=magnitudes), limit
