"""只量化权重的损失（PARITY-21）：演示检查点每种格式导出一遍，对未量化的 PyTorch 量 logits，对未量化的 bundle 量困惑度与 KL 散度。

量在三段文本上：演示模型留出的篇目（训练与分词器都没有见过，中文、英文各一段），与没有量化的它从 bos 起自己采样的，一条一窗，前文就是采样时的
前文。散布是按窗自助抽样的 95 % 区间：困惑度之比跨过 1 的，好坏说不清；KL 散度看整个分布，稳得多，校准有没有用看它。
校准的文本有两种，都与测的不相交：训练的篇目（与用途相近的文本），与模型自己采样的（手头没有文本时）。

语料来自 Debian 软件包 fortunes-zh 与 bible-kjv，没装就拒绝；缩小的场景只用采样的文本。
只量精度与大小，与机器忙不忙无关；int8 的 kernel 随指令集而异，末位会有出入。没有算子库时激活也舍入到 int8，量的是另一回事，所以拒绝。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer

from deepseek_export import api
from deepseek_export.benchmark.spread import Spread
from deepseek_export.bundle import Bundle
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.cli.demo import CHECKPOINT
from perf.results import Case, SuiteResult
from perf.workload.library import require_library
from perf.workload.perplexity import Losses, losses, predictions, windows
from perf.workload.workspace import Workspace
from tools.demo_training import data, evaluate

TITLE = "只量化权重的损失"
PROFILE = "mla+moe"
#: 各段文本的名字。
CHINESE, ENGLISH, SAMPLED = "中文", "英文", "采样的"
HELD_OUT = (CHINESE, ENGLISH)
#: 困惑度之比叫什么 → 合起来算的几段。
PERPLEXITIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "困惑度": HELD_OUT,
        "困惑度（中文）": (CHINESE,),
        "困惑度（英文）": (ENGLISH,),
        "困惑度（采样的文本）": (SAMPLED,),
    }
)
#: 每个 token 的 KL 散度；校准的另比最近的码的。
DIVERGENCE, DIVERGENCE_RATIO = "KL 散度", "KL 散度/最近的码"
#: 校准的文本。
DOCUMENTS, SAMPLES = "训练的篇目", "采样的文本"
#: 划分语料的种子，与训练演示检查点时相同：留出的因此没有见过。
_CORPUS_SEED = 0
_PLAIN, _CALIBRATED = "未量化", "，校准"
_SAMPLE_TOKENS = 500


@dataclass(frozen=True)
class Scenario:
    """固定的场景。

    Attributes:
        formats: （格式，块，保留浮点的）；留 lm_head、self_attn、kv_b_proj、embed_tokens 的看它们各占多少。
        calibrated: 校准的 int4，（块，校准的文本）。
        window: 一窗几个 token。
        windows: 留出的中文、英文各至多几窗；0 是不量。
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
    calibrated: tuple[tuple[int, str], ...] = (
        (32, DOCUMENTS),
        (64, DOCUMENTS),
        (128, DOCUMENTS),
        (32, SAMPLES),
        (128, SAMPLES),
    )
    window: int = 512
    windows: tuple[int, int] = (13, 39)
    sampled: tuple[int, int] = (128, 160)


FULL = Scenario()
QUICK = Scenario(formats=(("int8", 32, ()),), calibrated=(), windows=(0, 0), sampled=(0, 4))


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """逐种格式导出、校验；每种只算一遍，散布来自文本。

    Raises:
        FileNotFoundError: 没有 C++ 算子库；没有装语料。
    """
    scenario = QUICK if quick else FULL
    require_library()
    corpora = data.load_corpora(_CORPUS_SEED) if any(scenario.windows) else {}
    plain = workspace.bundle(CHECKPOINT, PROFILE)
    texts = _texts(scenario, corpora, plain)
    with api.load(plain, threads) as model:
        unquantized = predictions(model, texts)
        found = {_PLAIN: losses(model, texts, unquantized)}
    cases = []
    for name, quantization, calibrate in _chosen(scenario, corpora, plain, workspace.folder):
        out = workspace.bundle(CHECKPOINT, PROFILE, "float32", (), quantization, calibrate)
        with api.load(out, threads) as model:
            found[name] = losses(model, texts, unquantized)
        case = _case(name, out, plain)
        case.ratios.update(_ratios(name, found))
        case.facts.update(_facts(found[name], found[_PLAIN]))
        cases.append(case)
    return SuiteResult(suite="quant", title=TITLE, scenario=asdict(scenario), cases=cases)


def _texts(scenario: Scenario, corpora: Mapping[str, data.Corpus], plain: Path) -> dict[str, list[list[int]]]:
    """各段文本的窗：留出的首尾相接再切，采样的一条一窗。"""
    found = {}
    if corpora:
        tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
        for name, language, limit in zip((CHINESE, ENGLISH), ("zh", "en"), scenario.windows, strict=True):
            documents = evaluate.encode(tokenizer, corpora[language].held)
            ids = [token for head, body in documents for token in (data.BOS, *head, *body, data.EOS)]
            found[name] = windows(ids, scenario.window, limit)
    rows = _samples(plain, scenario.sampled[1], seed=1)[0]
    found[SAMPLED] = [[data.BOS, *row] for row in rows]
    return found


def _chosen(
    scenario: Scenario, corpora: Mapping[str, data.Corpus], plain: Path, folder: Path
) -> Iterator[tuple[str, Quantization, Path | None]]:
    """各种格式与校准的，各是什么名字、用什么文本。"""
    for kind, block, keep in scenario.formats:
        quantization = Quantization.model_validate({"kind": kind, "block": block, "keep": keep})
        yield case_name(kind, block, keep), quantization, None
    if not scenario.calibrated:
        return
    # 英文的篇目是中文的十倍，只取其中的八分之一；取窗是均匀的，所以两种差不多各占一半。
    trained = [*corpora["zh"].train, *corpora["en"].train[::8]]
    paths = {
        DOCUMENTS: _written(folder / "documents.txt", [head + body for head, body in trained]),
        SAMPLES: _written(folder / "samples.txt", _samples(plain, scenario.sampled[0], seed=100_000)[1]),
    }
    for block, text in scenario.calibrated:
        name = calibrated_name(block, text)
        yield name, Quantization.model_validate({"kind": "int4", "block": block}), paths[text]


def _case(name: str, out: Path, plain: Path) -> Case:
    """一种格式：大小与 logits 的误差。"""
    report = api.verify(out, levels=["model"])
    assert report.loss is not None
    ratios = {
        "大小": _weight_bytes(out) / _weight_bytes(plain),
        "logits 的相对误差": report.loss.relative_error,
        "路由分叉之前的相对误差": report.loss.relative_error_before_a_flip,
    }
    facts: dict[str, Any] = {
        "weight_bytes": _weight_bytes(out),
        "tokens": report.loss.tokens,
        "before_a_flip": report.loss.before_a_flip,
        "passed": report.passed,
    }
    entry = Bundle.open(out).manifest.quantization
    assert entry is not None
    if entry.calibration is not None:
        facts |= {
            "calibration_tokens": entry.calibration.tokens,
            "not_calibrated": len(entry.calibration.nearest),
        }
    shown = {what: Spread.of([value]) for what, value in ratios.items() if value is not None}
    return Case(name=name, values={}, ratios=shown, facts=facts)


def _ratios(name: str, found: Mapping[str, Losses]) -> dict[str, Spread]:
    """困惑度与 KL 散度；没有留出的文本就在采样的上面量。"""
    mine, plain = found[name], found[_PLAIN]
    held = HELD_OUT if mine.loss.keys() >= set(HELD_OUT) else (SAMPLED,)
    ratios = {
        what: mine.perplexity_ratio(plain, texts)
        for what, texts in PERPLEXITIES.items()
        if mine.loss.keys() >= set(texts)
    }
    ratios[DIVERGENCE] = mine.divergence_per_token(held)
    nearest, calibrated, _ = name.partition(_CALIBRATED)
    if calibrated:
        ratios[DIVERGENCE_RATIO] = mine.divergence_ratio(found[nearest], held)
    return ratios


def _facts(mine: Losses, plain: Losses) -> dict[str, Any]:
    texts = list(mine.loss)
    held = [text for text in texts if text in HELD_OUT] or texts
    return {
        "perplexity": {"量化": mine.perplexity(held), "未量化": plain.perplexity(held)},
        "text_tokens": {text: int(mine.tokens[text].sum()) for text in texts},
    }


def case_name(kind: str, block: int, keep: tuple[str, ...]) -> str:
    """``int4 块 32，留 lm_head``。"""
    kept = "、".join(keep)
    return f"{kind} 块 {block}" + (f"，留 {kept}" if keep else "")


def calibrated_name(block: int, text: str) -> str:
    """``int4 块 32，校准（训练的篇目）``。"""
    return f"{case_name('int4', block, ())}{_CALIBRATED}（{text}）"


def _samples(bundle: Path, count: int, seed: int) -> tuple[list[list[int]], list[str]]:
    """没有量化的演示模型自己采样的，从 bos 起，各到 EOS 为止：token 与文本。"""
    if not count:
        return [], []
    with api.load(bundle) as model:
        found = model.generate([[data.BOS]] * count, _SAMPLE_TOKENS, temperature=1.0, seed=seed)
    assert found.text is not None
    return found.token_ids, found.text


def _written(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _weight_bytes(out: Path) -> int:
    return sum(recipe.nbytes for recipe in Bundle.open(out).manifest.weights.recipes.values())
