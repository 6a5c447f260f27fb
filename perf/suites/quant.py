"""只量化权重的损失（PARITY-21）：演示检查点每种格式导出一遍，对未量化的 PyTorch 量 logits 与困惑度。

困惑度量在两段文本上：留出的开头（短，各种格式之间的差别有一半是偶然），与演示模型自己采样的（长得多，比值就是两个分布的差别）。校准的
文本也由它采样，种子不同：仓库里没有语料，谁都能重复。

只量精度与大小，与机器忙不忙无关；int8 的 kernel 随指令集而异，末位会有出入。没有算子库时激活也舍入到 int8，量的是另一回事，所以拒绝。
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
#: 两段文本上的困惑度之比叫什么。
HELD_OUT, SAMPLED = "困惑度", "困惑度（采样的文本）"
_SAMPLE_TOKENS = 500


@dataclass(frozen=True)
class Scenario:
    """固定的场景。

    Attributes:
        formats: （格式，块，保留浮点的）；留 lm_head、self_attn、kv_b_proj、embed_tokens 的看它们各占多少。
        calibrated: 校准的 int4，块。
        sampled: 校准用几条采样的文本，测困惑度用几条。
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
    calibrated: tuple[int, ...] = (32, 64, 128)
    sampled: tuple[int, int] = (128, 24)


FULL = Scenario()
QUICK = Scenario(formats=(("int8", 32, ()),), calibrated=(), sampled=(0, 4))


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """逐种格式导出、校验；每种只算一遍，没有散布。

    Raises:
        FileNotFoundError: 没有 C++ 算子库。
    """
    scenario = QUICK if quick else FULL
    if find_library() is None:
        raise FileNotFoundError(f"没有 C++ 算子库：{BUILD_COMMAND}")
    plain = workspace.bundle(CHECKPOINT, PROFILE)
    prompts = json.loads((CHECKPOINT / "heldout_prompts.json").read_text(encoding="utf-8"))
    learnt, fresh = scenario.sampled
    texts = {
        HELD_OUT: _written(workspace.folder / "heldout_prompts.txt", prompts),
        SAMPLED: _written(workspace.folder / "sampled.txt", _samples(plain, fresh, seed=1)),
    }
    chosen: list[tuple[str, Quantization, Path | None]] = [
        (
            case_name(kind, block, keep),
            Quantization.model_validate({"kind": kind, "block": block, "keep": keep}),
            None,
        )
        for kind, block, keep in scenario.formats
    ]
    if scenario.calibrated:
        path = _written(workspace.folder / "calibration.txt", _samples(plain, learnt, seed=100_000))
        chosen += [
            (
                f"{case_name('int4', block, ())}，校准",
                Quantization.model_validate({"kind": "int4", "block": block}),
                path,
            )
            for block in scenario.calibrated
        ]
    cases = [
        _measured(
            name, workspace.bundle(CHECKPOINT, PROFILE, "float32", (), quantization, calibrate), texts, plain
        )
        for name, quantization, calibrate in chosen
    ]
    return SuiteResult(suite="quant", title=TITLE, scenario=asdict(scenario), cases=cases)


def _measured(name: str, out: Path, texts: Mapping[str, Path], plain: Path) -> Case:
    """一种格式：大小、误差、两段文本上的困惑度。"""
    size = _weight_bytes(out)
    ratios: dict[str, float | None] = {"大小": size / _weight_bytes(plain)}
    facts: dict[str, Any] = {"weight_bytes": size}
    for what, text in texts.items():
        report = api.verify(out, levels=["model"], text=text)
        assert report.loss is not None
        assert report.loss.perplexity is not None
        loss, perplexity = report.loss, report.loss.perplexity
        if what == HELD_OUT:
            ratios |= {
                "logits 的相对误差": loss.relative_error,
                "路由分叉之前的相对误差": loss.relative_error_before_a_flip,
            }
            facts |= {
                "tokens": loss.tokens,
                "before_a_flip": loss.before_a_flip,
                "perplexity": {"量化": perplexity.bundle, "未量化": perplexity.unquantized},
                "perplexity_tokens": perplexity.tokens,
                "passed": report.passed,
            }
        else:
            facts["sampled_tokens"] = perplexity.tokens
        ratios[what] = perplexity.bundle / perplexity.unquantized
    entry = Bundle.open(out).manifest.quantization
    assert entry is not None
    if entry.calibration is not None:
        facts |= {
            "calibration_tokens": entry.calibration.tokens,
            "not_calibrated": len(entry.calibration.nearest),
        }
    shown = {what: Spread.of([value]) for what, value in ratios.items() if value is not None}
    return Case(name=name, values={}, ratios=shown, facts=facts)


def case_name(kind: str, block: int, keep: tuple[str, ...]) -> str:
    """``int4 块 32，留 lm_head``。"""
    kept = "、".join(keep)
    return f"{kind} 块 {block}" + (f"，留 {kept}" if keep else "")


def _samples(bundle: Path, count: int, seed: int) -> list[str]:
    """没有量化的演示模型自己采样的，从 bos 起，各到 EOS 为止。"""
    if not count:
        return []
    with api.load(bundle) as model:
        found = model.generate([[0]] * count, _SAMPLE_TOKENS, temperature=1.0, seed=seed)
    assert found.text is not None
    return found.text


def _written(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _weight_bytes(out: Path) -> int:
    return sum(recipe.nbytes for recipe in Bundle.open(out).manifest.weights.recipes.values())
