"""在 Triton 的解释器里把一个测试文件再跑一遍：解释器须在导入 triton 之前用环境变量打开，之后本进程就不能再编译。"""

from __future__ import annotations

import os
import subprocess
import sys


def run_in_interpreter(file: str, chosen: str) -> None:
    """子进程里的全部测试通过。

    Args:
        file: 测试文件。
        chosen: 给 pytest 的 ``-m``。
    """
    # 不量覆盖率：kernel 在解释器里逐行执行，追踪器让它慢一倍。
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", file, "-m", chosen]
    done = subprocess.run(
        command, env={**env, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
