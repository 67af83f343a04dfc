"""Fused ops with gradients. One public op a file; backends are chosen in dispatch.py."""

from qirl_fast.ops._qk_checks import Stream
from qirl_fast.ops.awm_logp import awm_logp
from qirl_fast.ops.awm_loss import AwmLoss, awm_loss
from qirl_fast.ops.dispatch import BackendError, use_backend
from qirl_fast.ops.flow_logp import flow_logp
from qirl_fast.ops.flow_step import flow_step
from qirl_fast.ops.fp8_linear import fp8_linear
from qirl_fast.ops.fp8_quantize import Quantized, fp8_quantize
from qirl_fast.ops.gate_residual import gate_residual
from qirl_fast.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from qirl_fast.ops.gelu import gelu
from qirl_fast.ops.group_advantage import GroupAdvantage, group_advantage
from qirl_fast.ops.guide import guide
from qirl_fast.ops.guide_step import guide_step
from qirl_fast.ops.lora_linear import lora_linear
from qirl_fast.ops.nft_loss import NftLoss, nft_loss
from qirl_fast.ops.norm_modulate import norm_modulate
from qirl_fast.ops.policy_loss import PolicyLoss, policy_loss
from qirl_fast.ops.qk_norm_rope import qk_norm_rope
from qirl_fast.ops.swiglu import swiglu
from qirl_fast.ops.velocity_loss import VelocityLoss, velocity_loss

__all__ = [
    "AwmLoss",
    "BackendError",
    "GroupAdvantage",
    "NftLoss",
    "PolicyLoss",
    "Quantized",
    "Stream",
    "VelocityLoss",
    "awm_logp",
    "awm_loss",
    "flow_logp",
    "flow_step",
    "fp8_linear",
    "fp8_quantize",
    "gate_residual",
    "gate_residual_norm_modulate",
    "gelu",
    "group_advantage",
    "guide",
    "guide_step",
    "lora_linear",
    "nft_loss",
    "norm_modulate",
    "policy_loss",
    "qk_norm_rope",
    "swiglu",
    "use_backend",
    "velocity_loss",
]
