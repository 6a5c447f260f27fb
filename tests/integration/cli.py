"""跑真正的 ``dsx``：缺省在本进程里走同一个入口，省去每次几秒的导入；要看信号、限额、管道的才开子进程。"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

from deepseek_export.checkpoint.synthetic import DEMO_CONFIG
from deepseek_export.cli.main import main
from tests.raised_codes import saw

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


#: 新开的终端里也有的环境变量，另加测试自己的缓存与路径。
_PLAIN = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "XDG_CACHE_HOME",
)


def environment(**extra: str) -> dict[str, str]:
    """子进程的环境：仓库根在路径上，不带颜色相关的变量。"""
    root = str(Path(__file__).parents[2])
    kept = {
        key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "COLUMNS", "DSX_HOME")
    }
    return {**kept, "PYTHONPATH": root, **extra}


def dsx(
    *args: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """在本进程里跑一次，收下退出码、stdout、stderr；没有接住的异常原样抛出。"""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    command, code, handler = [*DSX, *map(str, args)], 0, signal.getsignal(signal.SIGTERM)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            contextlib.chdir(cwd or Path.cwd()),
            mock.patch.dict(os.environ, environment() if env is None else env, clear=True),
        ):
            main(command[len(DSX) :])
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        signal.signal(signal.SIGTERM, handler)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(command, code, *texts)


def dsx_process(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """在子进程里跑一次。"""
    options.setdefault("env", environment())
    return subprocess.run([*DSX, *map(str, args)], capture_output=True, text=True, timeout=300, **options)


def dsx_limited(
    limit: int, *args: object, cwd: Path | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """在子进程里跑一次，一个文件至多 ``limit`` 字节；只带要紧的环境变量。

    不算覆盖率：它自己的文件也写不下这么小的上限。torch 在测试进程里设下的缓存目录也不带：带了，导入就不再要临时目录。
    """
    kept = {key: value for key, value in environment(**extra).items() if key in _PLAIN or key in extra}
    kept["PYTHONDONTWRITEBYTECODE"] = "1"  # 写到一半的 .pyc 会留给后面的进程

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return dsx_process(*args, env=kept, cwd=cwd, preexec_fn=lower)


def last_json(process: subprocess.CompletedProcess[str]) -> Any:
    """stdout 的最后一行。"""
    return json.loads(process.stdout.splitlines()[-1])


def assert_refused(process: subprocess.CompletedProcess[str], code: str) -> None:
    """退出码 1；stderr 以三行的错误结尾，没有 traceback。"""
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    head, what, todo = process.stderr.splitlines()[-3:]
    assert head.startswith(f"{code} "), process.stderr
    saw(code)
    assert what.startswith("  ")
    assert what.strip()
    assert todo.startswith("  建议：")
