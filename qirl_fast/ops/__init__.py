"""Fused ops with gradients. One public op a file; backends are chosen in dispatch.py."""

from qirl_fast.ops.dispatch import BackendError, use_backend
from qirl_fast.ops.flow_logp import flow_logp
from qirl_fast.ops.flow_step import flow_step
from qirl_fast.ops.group_advantage import GroupAdvantage, group_advantage
from qirl_fast.ops.guide import guide
from qirl_fast.ops.lora_linear import lora_linear
from qirl_fast.ops.policy_loss import PolicyLoss, policy_loss

__all__ = [
    "BackendError",
    "GroupAdvantage",
    "PolicyLoss",
    "flow_logp",
    "flow_step",
    "group_advantage",
    "guide",
    "lora_linear",
    "policy_loss",
    "use_backend",
]
