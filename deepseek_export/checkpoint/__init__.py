"""HF 检查点的入口：配置、张量索引、核对。拿不准就拒绝，打开时不读权重。"""

from deepseek_export.checkpoint.checkpoint import (
    Checkpoint,
    dtype_conflict,
    expected_mtp_tensors,
    expected_tensors,
    require_mtp,
)
from deepseek_export.checkpoint.config import ModelConfig, load_model_config, parse_model_config
from deepseek_export.checkpoint.generation_config import stop_token_ids
from deepseek_export.checkpoint.rope_config import RopeConfig
from deepseek_export.checkpoint.store import TensorStore

__all__ = [
    "Checkpoint",
    "ModelConfig",
    "RopeConfig",
    "TensorStore",
    "dtype_conflict",
    "expected_mtp_tensors",
    "expected_tensors",
    "load_model_config",
    "parse_model_config",
    "require_mtp",
    "stop_token_ids",
]
