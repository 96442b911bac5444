"""From a network alone to a plan: degree, modulus chain, scales, layouts, diagonals, rotations, predicted error."""

from hemacrypt.planner.build import KEY_BUDGET, plan_bundle, plan_model, plan_network

__all__ = ["KEY_BUDGET", "plan_bundle", "plan_model", "plan_network"]
