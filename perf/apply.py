"""apply(model, "mla") 的解码时间：同一个 transformers 模型，替换前后交替各走一步（HF-12）。

    python perf/apply.py [--steps 9] [--threads 2] [--out perf/results/apply.json]

模型是 DeepSeek-V2-Lite 的宽度（16 头、hidden 2048、latent 512+64），2 层、8 个专家、随机权重、float32，attention 实现是 sdpa。缓存用随机的
latent 填到指定的长度，每个样本是一次 S=1 的前向，走完就退回；报告每个 token 的时间与逐对的比（替换后 / 原样）。
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
CONTEXTS = (256, 1024, 4096, 8192)


def build():
    """随机权重的小层数模型。"""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        topk_method="greedy",
        n_group=None,
        topk_group=None,
        max_position_embeddings=16384,
    )
    return DeepseekV2ForCausalLM(config).eval()


def filled_cache(model, length: int):
    """每层 ``length`` 行随机 latent 的缓存。"""
    import torch
    from transformers import DynamicCache

    cache, config = DynamicCache(config=model.config), model.config
    for layer in range(config.num_hidden_layers):
        cache.update(
            torch.randn(1, 1, length, config.kv_lora_rank),
            torch.randn(1, 1, length, config.qk_rope_head_dim),
            layer,
        )
    return cache


@click.command()
@click.option("--steps", default=9, show_default=True, help="每个长度走几对。")
@click.option("--threads", default=2, show_default=True, help="torch 的线程数。")
@click.option("--out", type=click.Path(path_type=Path), help="结果追加到这个 JSON 文件。")
def main(steps: int, threads: int, out: Path | None) -> None:
    """比较原样的 transformers 与 apply(model, "mla") 的单步时间。"""
    import torch

    import deepseek_export as dsx
    from deepseek_export.bench.environment import environment
    from deepseek_export.integration.compat import cache_name

    machine = environment(threads, ROOT)
    torch.set_num_threads(threads)
    model = build()
    token = torch.tensor([[1]])

    def step(cache) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model(token, use_cache=True, **{cache_name(): cache})
        seconds = time.perf_counter() - start
        cache.crop(-1)
        return seconds

    samples: dict[int, list[dict[str, float]]] = {}
    for length in CONTEXTS:
        cache = filled_cache(model, length)
        for profile in ("baseline", "mla"):  # 预热
            dsx.apply(model, profile)
            step(cache)
        samples[length] = []
        for _ in range(steps):
            pair = {}
            for name, profile in (("plain", "baseline"), ("mla", "mla")):
                dsx.apply(model, profile)
                pair[name] = step(cache)
            samples[length].append(pair)
        ratios = [pair["mla"] / pair["plain"] for pair in samples[length]]
        plain, mla = (statistics.median(pair[name] for pair in samples[length]) for name in ("plain", "mla"))
        click.echo(
            f"上下文 {length:5d}：原样 {plain * 1e3:7.1f} ms，mla {mla * 1e3:6.1f} ms，"
            f"mla / 原样 = {statistics.median(ratios):.3f}（逐对 {min(ratios):.3f}–{max(ratios):.3f}）"
        )
    if out is not None:
        history = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        history.append({"environment": machine, "samples": samples})
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(history, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
