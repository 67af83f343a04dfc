"""Fused ops with gradients. One public op a file; backends are chosen in dispatch.py."""

from qirl_fast.ops._qk_checks import Stream
from qirl_fast.ops.dispatch import BackendError, use_backend
from qirl_fast.ops.flow_logp import flow_logp
from qirl_fast.ops.flow_step import flow_step
from qirl_fast.ops.fp8_linear import fp8_linear
from qirl_fast.ops.fp8_quantize import fp8_quantize
from qirl_fast.ops.gelu import gelu
from qirl_fast.ops.group_advantage import GroupAdvantage, group_advantage
from qirl_fast.ops.guide import guide
from qirl_fast.ops.policy_loss import PolicyLoss, policy_loss
from qirl_fast.ops.qk_norm_rope import qk_norm_rope
from qirl_fast.ops.swiglu import swiglu

__all__ = [
    "BackendError",
    "GroupAdvantage",
    "PolicyLoss",
    "Stream",
    "flow_logp",
    "flow_step",
    "fp8_linear",
    "fp8_quantize",
    "gelu",
    "group_advantage",
    "guide",
    "policy_loss",
    "qk_norm_rope",
    "swiglu",
    "use_backend",
]
