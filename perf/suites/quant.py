"""只量化权重的损失（PARITY-21）：演示检查点每种格式导出一遍，对未量化的 PyTorch 量 logits 与困惑度。

只量精度与大小，与机器忙不忙无关；int8 的 kernel 随指令集而异，末位会有出入。没有算子库时激活也舍入到 int8，量的是另一回事，所以拒绝。
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from deepseek_export import api
from deepseek_export.benchmark.spread import Spread
from deepseek_export.bundle import Bundle
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.cpu_library import BUILD_COMMAND, find_library
from perf.results import Case, SuiteResult
from perf.workload.workspace import Workspace

TITLE = "只量化权重的损失"
PROFILE = "mla+moe"


@dataclass(frozen=True)
class Scenario:
    """固定的场景。

    Attributes:
        formats: （格式，块，保留浮点的）；留 lm_head、self_attn、kv_b_proj、embed_tokens 的看它们各占多少。
    """

    formats: tuple[tuple[str, int, tuple[str, ...]], ...] = (
        ("int8", 32, ()),
        ("int8", 64, ()),
        ("int8", 128, ()),
        ("int4", 32, ()),
        ("int4", 64, ()),
        ("int4", 128, ()),
        ("int4", 32, ("lm_head",)),
        ("int4", 32, ("lm_head", "self_attn")),
        ("int8", 32, ("kv_b_proj",)),
        ("int8", 32, ("embed_tokens",)),
        ("int4", 32, ("kv_b_proj",)),
        ("int4", 32, ("embed_tokens",)),
    )


FULL = Scenario()
QUICK = Scenario(formats=(("int8", 32, ()),))


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """逐种格式导出、校验；每种只算一遍，没有散布。

    Raises:
        FileNotFoundError: 没有 C++ 算子库。
    """
    scenario = QUICK if quick else FULL
    if find_library() is None:
        raise FileNotFoundError(f"没有 C++ 算子库：{BUILD_COMMAND}")
    prompts = json.loads((CHECKPOINT / "heldout_prompts.json").read_text(encoding="utf-8"))
    text = workspace.folder / "heldout_prompts.txt"
    text.write_text("\n".join(prompts), encoding="utf-8")
    plain = _weight_bytes(workspace.bundle(CHECKPOINT, PROFILE))
    cases = []
    for kind, block, keep in scenario.formats:
        quantization = Quantization.model_validate({"kind": kind, "block": block, "keep": keep})
        out = workspace.bundle(CHECKPOINT, PROFILE, "float32", (), quantization)
        report = api.verify(out, levels=["model"], text=text)
        assert report.loss is not None
        assert report.loss.perplexity is not None
        loss, perplexity, size = report.loss, report.loss.perplexity, _weight_bytes(out)
        ratios = {
            "大小": size / plain,
            "logits 的相对误差": loss.relative_error,
            "路由分叉之前的相对误差": loss.relative_error_before_a_flip,
            "困惑度": perplexity.bundle / perplexity.unquantized,
        }
        facts = {
            "weight_bytes": size,
            "tokens": loss.tokens,
            "before_a_flip": loss.before_a_flip,
            "perplexity": {"量化": perplexity.bundle, "未量化": perplexity.unquantized},
            "perplexity_tokens": perplexity.tokens,
            "passed": report.passed,
        }
        shown = {name: Spread.of([value]) for name, value in ratios.items() if value is not None}
        cases.append(Case(name=case_name(kind, block, keep), values={}, ratios=shown, facts=facts))
    return SuiteResult(suite="quant", title=TITLE, scenario=asdict(scenario), cases=cases)


def case_name(kind: str, block: int, keep: tuple[str, ...]) -> str:
    """``int4 块 32，留 lm_head``。"""
    kept = "、".join(keep)
    return f"{kind} 块 {block}" + (f"，留 {kept}" if keep else "")


def _weight_bytes(out: Path) -> int:
    return sum(recipe.nbytes for recipe in Bundle.open(out).manifest.weights.recipes.values())
