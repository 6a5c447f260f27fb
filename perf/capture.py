"""捕获时间与层数的关系：同宽的 4 层与 61 层模型，交替各跑几遍，报告中位数与范围（EXPORT-6）。

    python perf/capture.py [--runs 5] [--out perf/results/capture.json]

每次在新进程里跑，并关掉磁盘缓存，因为追踪结果有缓存；计时不含导入 torch。每种块只追踪一次，所以两者应当接近。
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import click

_SCRIPT = """
import json, resource, sys, time
from deepseek_export.capture import capture_model
from deepseek_export.checkpoint import parse_model_config
from deepseek_export.profile import resolve_profile
config = parse_model_config(json.loads(sys.argv[1]), "perf")
start = time.perf_counter()
captured = capture_model(config, resolve_profile("mla+moe"), "float32")
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "nodes": len(captured.proto.graph.node), "peak_rss": peak}))
"""

#: DeepSeek-V3 的公开 config（宽度全是真的），只改层数。
_V3 = {
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 163840,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


@click.command()
@click.option("--runs", default=5, show_default=True, help="每种层数跑几遍。")
@click.option("--out", type=click.Path(path_type=Path), help="结果追加到这个 JSON 文件。")
def main(runs: int, out: Path | None) -> None:
    """比较 4 层与 61 层的捕获时间。"""
    samples: dict[int, list[dict]] = {4: [], 61: []}
    for _ in range(runs):
        for layers, results in samples.items():  # 交替：机器变慢时两边一起慢
            config = json.dumps({**_V3, "num_hidden_layers": layers})
            done = subprocess.run(
                [sys.executable, "-c", _SCRIPT, config],
                capture_output=True,
                check=True,
                env=os.environ | {"DSX_NO_CACHE": "1"},
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    for layers, results in samples.items():
        seconds = [result["seconds"] for result in results]
        click.echo(
            f"{layers:3d} 层：捕获 {statistics.median(seconds):.2f} s（{min(seconds):.2f}–{max(seconds):.2f}），"
            f"{results[0]['nodes']} 个节点，峰值常驻内存 {results[0]['peak_rss'] / 1e6:.0f} MB"
        )
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(samples[4], samples[61], strict=True)]
    click.echo(f"61 层 / 4 层 = {statistics.median(ratios):.2f}（逐对 {min(ratios):.2f}–{max(ratios):.2f}）")
    if out is not None:
        import torch

        history = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        environment = {"python": platform.python_version(), "torch": torch.__version__}
        history.append({"environment": environment, "samples": samples, "ratios": ratios})
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(history, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
