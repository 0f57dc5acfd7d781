"""Tensor and pipeline parallelism, applied from outside the model: plans, cuts of stored weights, process groups."""

from .plan import Cut, LayerShare, Plan, Share, make_plan

__all__ = ["Cut", "LayerShare", "Plan", "Share", "make_plan"]
