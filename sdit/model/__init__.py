"""The networks DiT, DTR and Switch-DiT, and the losses on their gates."""

from sdit.model.balance import balance_loss
from sdit.model.build import ParameterCount, build_model, count_parameters, parse_model_config
from sdit.model.dit import DiffusionTransformer
from sdit.model.guidance import forward_with_guidance
from sdit.model.layer import Layer, Router
from sdit.model.moe.base import Experts
from sdit.model.moe.experts import LinearExperts, build_experts, experts_need_plan
from sdit.model.moe.local import LocalDispatcher
from sdit.model.moe.mlp_experts import MlpExperts
from sdit.model.prior import Assignment, UnitMatcher, prior_divergence, prior_loss, solve_assignment
from sdit.model.weights import fill_buffers, init_weights

__all__ = [
    "Assignment",
    "DiffusionTransformer",
    "Experts",
    "Layer",
    "LinearExperts",
    "LocalDispatcher",
    "MlpExperts",
    "ParameterCount",
    "Router",
    "UnitMatcher",
    "balance_loss",
    "build_experts",
    "build_model",
    "count_parameters",
    "experts_need_plan",
    "fill_buffers",
    "forward_with_guidance",
    "init_weights",
    "parse_model_config",
    "prior_divergence",
    "prior_loss",
    "solve_assignment",
]
