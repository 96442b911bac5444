"""From a network alone to a plan: degree, modulus chain, scales, layouts, diagonals, rotations, predicted error."""

from hemacrypt.planner.build import plan_bundle, plan_network

__all__ = ["plan_bundle", "plan_network"]
