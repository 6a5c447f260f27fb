"""只量化权重的损失：每种格式导出一遍，对未量化的 PyTorch 量 logits 与困惑度（PARITY-21）。

    python perf/quant.py CKPT [--text FILE] [--result perf/results/quant.json]

``CKPT`` 是带 tokenizer 的检查点；困惑度的文本缺省取检查点旁的留出集。只量精度与大小，与机器忙不忙无关；int8 的 kernel 随指令集而异，
末位会有出入。
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from deepseek_export.bench.environment import environment

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "deepseek_export/demo_checkpoint/heldout_prompts.json"

#: 格式 → 保留。后两行看 lm_head 与注意力各占多少。
CASES: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("int8", 32, ()),
    ("int8", 64, ()),
    ("int8", 128, ()),
    ("int4", 32, ()),
    ("int4", 64, ()),
    ("int4", 128, ()),
    ("int4", 32, ("lm_head",)),
    ("int4", 32, ("lm_head", "self_attn")),
)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-p", "--profile", default="mla+moe", show_default=True, help="方案。")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="测困惑度的文本。")
@click.option("--result", type=click.Path(path_type=Path), help="结果写到这个 JSON 文件。")
def main(checkpoint: Path, profile: str, text: Path | None, result: Path | None) -> None:
    """逐种格式导出、校验，列出损失。"""
    machine = environment(None, ROOT)
    with tempfile.TemporaryDirectory() as folder:
        passage = text or Path(folder) / "heldout_prompts.txt"
        if text is None:
            passage.write_text("\n".join(json.loads(PROMPTS.read_text(encoding="utf-8"))), encoding="utf-8")
        plain = _export(checkpoint, Path(folder) / "plain", profile, None)
        rows = []
        for kind, block, keep in CASES:
            out = Path(folder) / f"{kind}-{block}-{'-'.join(keep)}"
            rows.append(_measure(checkpoint, out, profile, kind, block, keep, passage))
            rows[-1]["size_ratio"] = round(rows[-1]["weight_bytes"] / plain, 4)
            click.echo(json.dumps(rows[-1], ensure_ascii=False))
    if result is not None:
        data = {"environment": machine, "profile": profile, "float32_bytes": plain, "cases": rows}
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _export(checkpoint: Path, out: Path, profile: str, quantization: Any) -> int:
    """导出，返回权重的字节数。"""
    import deepseek_export as dsx

    bundle = dsx.export(checkpoint, out, profile, target="ort-cpu", quantization=quantization)
    return sum(recipe.nbytes for recipe in bundle.manifest.weights.recipes.values())


def _measure(
    checkpoint: Path, out: Path, profile: str, kind: str, block: int, keep: tuple[str, ...], text: Path
) -> dict[str, Any]:
    import deepseek_export as dsx

    quantization = dsx.Quantization.model_validate({"kind": kind, "block": block, "keep": keep})
    weight_bytes = _export(checkpoint, out, profile, quantization)
    report = dsx.verify(out, levels=["model"], text=text)
    loss = report.loss
    assert loss is not None
    assert loss.perplexity is not None
    return {
        "kind": kind,
        "block": block,
        "keep": list(keep),
        "weight_bytes": weight_bytes,
        "tokens": loss.tokens,
        "before_a_flip": loss.before_a_flip,
        "relative_error_before_a_flip": loss.relative_error_before_a_flip,
        "relative_error": loss.relative_error,
        "perplexity": loss.perplexity.bundle,
        "unquantized_perplexity": loss.perplexity.unquantized,
        "perplexity_tokens": loss.perplexity.tokens,
        "passed": report.passed,
    }


if __name__ == "__main__":
    main()
