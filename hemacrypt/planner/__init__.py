"""From a network alone to a plan: degree, modulus chain, scales, layouts, diagonals, rotations, predicted error."""

from hemacrypt.planner.latency.choices import KEY_BUDGET
from hemacrypt.planner.latency.ckks import plan_bundle, plan_model, plan_network
from hemacrypt.planner.offer import plan_bundle_layouts, plan_layouts

__all__ = ["KEY_BUDGET", "plan_bundle", "plan_bundle_layouts", "plan_layouts", "plan_model", "plan_network"]
