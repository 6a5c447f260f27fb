"""在子进程里跑真正的 ``dsx``。"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deepseek_export.checkpoint.synthetic import DEMO_CONFIG

DSX = (sys.executable, "-m", "deepseek_export.cli.main")

#: 尽可能小的 V3：一层稠密、一层 MoE，没有 tokenizer。
TINY = MappingProxyType(
    {
        **DEMO_CONFIG,
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "max_position_embeddings": 128,
        "rope_scaling": None,
    }
)


def environment(**extra: str) -> dict[str, str]:
    """子进程的环境：仓库根在路径上，不带颜色相关的变量。"""
    root = str(Path(__file__).parents[2])
    kept = {
        key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "COLUMNS", "DSX_HOME")
    }
    return {**kept, "PYTHONPATH": root, **extra}


def dsx(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """跑一次，收下退出码、stdout、stderr。"""
    options.setdefault("env", environment())
    return subprocess.run([*DSX, *map(str, args)], capture_output=True, text=True, timeout=300, **options)


def last_json(process: subprocess.CompletedProcess[str]) -> Any:
    """stdout 的最后一行。"""
    return json.loads(process.stdout.splitlines()[-1])


def assert_refused(process: subprocess.CompletedProcess[str], code: str) -> None:
    """退出码 1；stderr 以三行的错误结尾，没有 traceback。"""
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    head, what, todo = process.stderr.splitlines()[-3:]
    assert head.startswith(f"{code} "), process.stderr
    assert what.startswith("  ")
    assert what.strip()
    assert todo.startswith("  建议：")
