"""MTP 吞吐：同一个 bundle、同一个会话上，普通解码与投机解码交替各跑几遍（MTP-6）。

    python perf/mtp.py OUT [--batch 8] [--new-tokens 256] [--runs 5] [--out perf/results/mtp.json]

``OUT`` 是 ``-p full --set mtp.num_draft_tokens=3`` 导出的 bundle（每步 4 个 token：3 个草稿加 1）。prompt 取自检查点旁的留出集。
报告逐对的时间比（投机 / 普通）及其范围、各位置接受率、每次主模型调用的 token 数，以及由实测步耗算出的盈亏平衡点。
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import click

PROMPTS = Path(__file__).resolve().parent.parent / "deepseek_export/demo_checkpoint/heldout_prompts.json"


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--batch", default=8, show_default=True, help="一批几条。")
@click.option("--new-tokens", default=256, show_default=True, help="每条生成多少个 token。")
@click.option("--runs", default=5, show_default=True, help="每种方式跑几遍。")
@click.option("--threads", default=2, show_default=True, help="ONNX Runtime 的线程数。")
@click.option("--no-floor", is_flag=True, help="关掉止损线：接受率低也一直投机，看投机本身的代价。")
@click.option("--prompts", type=click.Path(path_type=Path), default=PROMPTS, help="prompt 的 JSON 列表。")
@click.option("--result", type=click.Path(path_type=Path), help="结果追加到这个 JSON 文件。")
def main(
    out: Path,
    batch: int,
    new_tokens: int,
    runs: int,
    threads: int,
    no_floor: bool,
    prompts: Path,
    result: Path | None,
) -> None:
    """比较普通解码与投机解码的墙钟时间。"""
    import deepseek_export as dsx

    model = dsx.load(out, threads=threads)
    texts = json.loads(prompts.read_text(encoding="utf-8"))
    # 留出集按语言排列：均匀地取，中英文各半。
    rows = [model.encode(texts[i * len(texts) // batch % len(texts)]) for i in range(batch)]
    if model.speculative is None:
        raise click.ClickException("这个 bundle 没有草稿模型：用 -p full 导出")
    if no_floor:
        model.speculative.floor = None

    def run(speculative: bool):
        start = time.perf_counter()
        outcome = model.generate(rows, new_tokens, speculative=speculative, ignore_eos=True)
        return time.perf_counter() - start, outcome

    _, plain = run(False)  # 预热
    _, spec = run(True)
    if plain.token_ids != spec.token_ids:
        raise click.ClickException("投机解码的输出与普通解码不同")
    samples = [{"plain": run(False)[0], "speculative": run(True)[0]} for _ in range(runs)]
    ratios = [sample["speculative"] / sample["plain"] for sample in samples]
    stats = spec.speculation
    assert stats is not None
    click.echo(f"batch {batch}，每条 {new_tokens} 个新 token，{threads} 线程，{runs} 对")
    for name in ("plain", "speculative"):
        seconds = [sample[name] for sample in samples]
        click.echo(
            f"  {name:12s} {statistics.median(seconds):.3f} s（{min(seconds):.3f}–{max(seconds):.3f}）"
        )
    click.echo(f"  投机 / 普通 = {statistics.median(ratios):.3f}（{min(ratios):.3f}–{max(ratios):.3f}）")
    rates = "、".join("-" if rate is None else f"{rate:.0%}" for rate in stats.acceptance)
    click.echo(
        f"  各位置接受率 {rates}；每次主模型调用 {stats.tokens_per_call:.2f} 个 token；"
        f"主模型 {stats.main_calls} 次，草稿 {stats.draft_calls} 次"
        + ("；中途退回普通解码" if stats.fell_back else "")
    )
    if result is not None:
        history = json.loads(result.read_text(encoding="utf-8")) if result.exists() else []
        environment = {
            "machine": platform.machine(),
            "python": platform.python_version(),
            "onnxruntime": version("onnxruntime"),
            "threads": threads,
        }
        history.append(
            {
                "environment": environment,
                "target": model.manifest.target,
                "batch": batch,
                "floor": not no_floor,
                "new_tokens": new_tokens,
                "samples": samples,
                "ratios": ratios,
                "speculation": stats.as_dict(),
            }
        )
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(history, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
