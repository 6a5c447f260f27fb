"""两个方案的 A/B：同一个检查点各导出一份，先看输出相不相同，再在同一次运行里交替地测。

    python examples/ab_profiles.py CKPT build/ab --a baseline --b mla+moe

命令行的写法是 ``dsx export`` 两次，再 ``dsx bench B --against A``；这里多一步：greedy 的 token 不相同就不测。
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import deepseek_export as dsx

PROMPT = [5, 9, 23, 100, 7, 42]


def make_bundles(checkpoint: Path, folder: Path, profiles: dict[str, str], target: str) -> dict[str, Path]:
    """每个方案一个 bundle。"""
    made = {}
    for name, profile in profiles.items():
        bundle = dsx.export(checkpoint, folder / name, profile, target=target, overwrite=True)
        made[name] = bundle.path
        print(f"{name}：{profile}，缓存每个 token {bundle.manifest.cache.bytes_per_token} 字节", flush=True)
    return made


def measure(bundle: Path, against: Path, context: int, runs: int) -> int:
    """交替地测，表印在 stdout 上，全部的数在 ``bundle`` 的 ``reports/bench.json``；返回退出码。"""
    command = [sys.executable, "-m", "deepseek_export", "bench", str(bundle), "--against", str(against)]
    command += ["--prompt-len", "64", "--new-tokens", "32", "--depth", str(context), "--runs", str(runs)]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """命令行。"""
    parser = argparse.ArgumentParser(description="两个方案的 A/B。")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="两个 bundle 放在哪里")
    parser.add_argument("--a", default="baseline", help="对照的方案")
    parser.add_argument("--b", default="mla+moe", help="要看的方案")
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--context", type=int, default=1024, help="在这么长的上下文上测一步")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    profiles = {"a": arguments.a, "b": arguments.b}
    bundles = make_bundles(arguments.checkpoint, arguments.folder, profiles, arguments.target)
    tokens = {name: dsx.load(path).generate([PROMPT], 32).token_ids for name, path in bundles.items()}
    if tokens["a"] != tokens["b"]:
        print("greedy 的输出不同：先用 dsx compare 看从哪里开始不同", file=sys.stderr)
        return 1
    return measure(bundles["b"], bundles["a"], arguments.context, arguments.runs)


if __name__ == "__main__":
    sys.exit(main())
