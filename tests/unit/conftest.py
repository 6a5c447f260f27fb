"""训练演示检查点的两个工具共用的夹具。"""

from __future__ import annotations

import importlib

import pytest

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}


@pytest.fixture(scope="module")
def tool():
    """``tools.demo_training`` 的各个模块。"""
    names = ("card", "data", "distill", "distill_card", "evaluate", "export", "loop", "model")
    return {name: importlib.import_module(f"tools.demo_training.{name}") for name in names}


@pytest.fixture(scope="module")
def tiny_config(tool):
    return {**tool["export"].demo_config(), **TINY}
