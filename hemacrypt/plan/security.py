"""How large a modulus may be: 128-bit classical security for ternary secrets.

Source: Albrecht et al., "Homomorphic Encryption Security Standard", HomomorphicEncryption.org, 2018, Table 1; the
same figures are compiled into Microsoft SEAL.
"""

from __future__ import annotations

from typing import Final

from hemacrypt.errors import PlanError

SECURITY_BITS: Final = 128

# Polynomial degree -> largest total bits of the modulus, special prime included.
LARGEST_MODULUS_BITS: Final = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}


def check_security(degree: int, modulus_bits: int) -> None:
    """Refuse parameters below 128-bit security.

    Parameters
    ----------
    degree:
        Polynomial degree N.
    modulus_bits:
        Bits of the product of all primes, the special one included.

    Raises
    ------
    PlanError
        If the degree is not in the table or the modulus is too large for it.
    """
    limit = LARGEST_MODULUS_BITS.get(degree)
    if limit is None:
        raise PlanError(f"polynomial degree {degree} has no security estimate; use one of {list(LARGEST_MODULUS_BITS)}")
    if modulus_bits > limit:
        raise PlanError(
            f"a modulus of {modulus_bits} bits at degree {degree} is below {SECURITY_BITS}-bit security; "
            f"at most {limit} bits are allowed: use fewer primes or a larger degree"
        )
