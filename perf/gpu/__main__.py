"""在一张 NVIDIA 卡上核对并测量插件的 kernel，不必安装 dsx：先与 torch 参考实现比，再计时（KERNEL-7、KERNEL-8）。

    python -m perf.gpu [--out build] [--budget 450] [--bundle OUT]

在检出的根目录运行，一条命令，不联网，8 分钟之内；只要 Python 3.11+、torch、triton、cuda-bindings、numpy。写出的
``gpu-<卡>-<日期>.jsonl`` 就是历史的一行，在装了 dsx 的机器上由 ``python -m perf add FILE`` 记进去；什么都装了的机器上，
``python -m perf run gpu`` 量的是同样的东西。给了 ``--bundle``（要装 dsx 与能用的 TensorRT）再建它的引擎，逐层校验、生成一段，不在 8 分钟
之内。核对不过、要求了引擎而没有跑成或校验不过，退出码是 1；没有 GPU 时只说一行。
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """解析参数，核对，计时，写一行历史。"""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build")
    parser.add_argument("--budget", type=float, default=450, help="整个命令的秒数上限")
    parser.add_argument("--bundle", type=Path, help="另用这个 bundle 建引擎、校验、生成")
    options = parser.parse_args()
    missing = [name for name in ("torch", "triton", "cuda.bindings", "numpy") if not _installed(name)]
    if missing:
        print(f"缺少 {'、'.join(missing)}", file=sys.stderr)
        return 1
    from deepseek_export.benchmark.environment import environment
    from perf.gpu import session

    started = datetime.now(UTC)
    machine = environment(None, ROOT) | {"command": "python -m perf.gpu", "cpu_library": None}
    try:
        suite = session.measure(session.FULL, options.budget, options.bundle)
    except (FileNotFoundError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    row = {"started": started.isoformat(timespec="seconds"), "quick": False, "environment": machine}
    card = re.sub(r"\W+", "-", suite["scenario"]["card"]).strip("-").lower()
    path = options.out / f"gpu-{card}-{started:%Y-%m-%d}.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row | {"suites": [suite], "skipped": []}, ensure_ascii=False)
    path.write_text(line + "\n", encoding="utf-8")
    print(f"{path}：python -m perf add 把它记进历史")
    engine = suite["cases"][-1]["facts"] if options.bundle else {}
    return 0 if engine.get("verified", options.bundle is None) else 1


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
