"""specs/mtp 里投机解码的承诺，在真导出的 bundle 上证明。"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deepseek_export
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.model import CompiledModel
from deepseek_export.runtime import MeasuredFloor, SpeculativeFloor
from tests.bundles import tampered
from tests.contract.test_mtp_contract import SMALL

pytestmark = [pytest.mark.contract, pytest.mark.heavy]


@pytest.fixture(scope="module", params=[1, 2], ids=["one-module", "two-modules"])
def model(request, tmp_path_factory) -> CompiledModel:
    """随机权重，草稿很少猜中：考验的是拒绝与回滚。"""
    folder = tmp_path_factory.mktemp("speculative")
    config = SMALL | {"num_nextn_predict_layers": request.param}
    path = write_checkpoint(folder / "ck", config, dtype="float32", mtp=True)
    deepseek_export.export(
        path, folder / "out", "full", target="ort-cpu", overrides=["mtp.num_draft_tokens=4"]
    )
    return deepseek_export.load(folder / "out", speculative_floor=False)


@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_speculative_greedy_equals_plain_greedy(model: CompiledModel, K: int):
    """MTP-2：batch 1 与长度不等的 batch 8，逐 token 相同。"""
    assert model.speculative is not None
    model.speculative.num_draft_tokens = K
    rng = np.random.default_rng(K)
    prompts = [rng.integers(0, 160, n).tolist() for n in (1, 3, 9, 17, 30, 2, 5, 44)]
    for rows in ([prompts[3]], prompts):
        plain = model.generate(rows, 48, speculative=False, ignore_eos=True)
        drafted = model.generate(rows, 48, ignore_eos=True)
        assert drafted.token_ids == plain.token_ids
        assert drafted.speculation is not None
        assert drafted.speculation.num_draft_tokens == K


def test_speculative_stops_at_the_generation_config_too(model: CompiledModel, tmp_path: Path):
    """RUNTIME-6：投机解码在同一个结束符停，草稿里它之后的不算。"""
    tokens = model.generate([[1, 2, 3]], 24, speculative=False, ignore_eos=True).token_ids[0]
    text = json.dumps({"eos_token_id": [tokens[9], 159]})

    def change(folder: Path) -> None:
        (folder / "generation_config.json").write_text(text, encoding="utf-8")

    stopped = deepseek_export.load(tampered(model.bundle, tmp_path, change).path)
    end = tokens.index(tokens[9]) + 1
    for speculative in (False, True):
        result = stopped.generate([[1, 2, 3]], 24, speculative=speculative)
        assert (result.token_ids, result.finish_reasons) == ([tokens[:end]], ["eos"])


def test_low_acceptance_falls_back_and_says_so(model: CompiledModel):
    """MTP-4：接受率低于界限就改回普通解码，输出不变，结果里有说明；加载时可以关掉，那就一直投机。"""
    default = deepseek_export.load(model.bundle.path).speculative
    assert default is not None
    assert isinstance(default.floor, MeasuredFloor)
    assert model.speculative is not None
    assert model.speculative.floor is None
    model.speculative.num_draft_tokens = 3
    kept = model.generate([[1, 2, 3]], 40, ignore_eos=True)
    assert kept.speculation is not None
    assert not kept.speculation.fell_back
    model.speculative.floor = SpeculativeFloor(min_acceptance=2.5, window=4)
    try:
        fallen = model.generate([[1, 2, 3]], 40, ignore_eos=True)
    finally:
        model.speculative.floor = None
    assert fallen.speculation is not None
    assert fallen.speculation.fell_back
    assert "普通解码" in fallen.notes[0]
    assert kept.token_ids == fallen.token_ids


def test_rejection_bundle_samples_and_verifies(tmp_path: Path):
    """MTP-3、RUNTIME-5：rejection 的 bundle 能导出、校验、采样；同一种子可复现，一行的结果与同批还有谁无关。"""
    path = write_checkpoint(tmp_path / "ck", SMALL, dtype="float32", mtp=True)
    deepseek_export.export(
        path, tmp_path / "out", "full", overrides=["mtp.verify=rejection", "mtp.num_draft_tokens=2"]
    )
    report = deepseek_export.verify(tmp_path / "out", levels=["block", "tokens"], steps=8)
    assert report.passed, report.first_failure
    assert any("rejection" in note for note in report.notes)
    model = deepseek_export.load(tmp_path / "out")
    assert model.speculative is not None
    assert isinstance(model.speculative.floor, SpeculativeFloor)
    first = model.generate([[5, 6], [7]], 12, temperature=0.8, seed=1, ignore_eos=True).token_ids
    assert first == model.generate([[5, 6], [7]], 12, temperature=0.8, seed=1, ignore_eos=True).token_ids
    assert [len(ids) for ids in first] == [12, 12]
    nearly_full = [3] * (model.manifest.model.max_position_embeddings - 2)
    for row, prompt in enumerate([[5, 6], [7]]):
        for companions in ([], [[1] * 9], [nearly_full], [[2], nearly_full, [4, 4]]):
            rows = [prompt, *companions]
            options: Any = {"temperature": 0.8, "seed": 1 + row, "ignore_eos": True}
            assert model.generate(rows, 12, **options).token_ids[0] == first[row]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> CompiledModel:
    """随包附带的、训练过的检查点：草稿大多猜中，考验的是连续接受。"""
    out = tmp_path_factory.mktemp("demo") / "out"
    overrides = ["mtp.num_draft_tokens=4"]
    deepseek_export.export(CHECKPOINT, out, "full", target="ort-cpu", overrides=overrides)
    # 一个线程：模型小，几个线程互相等，机器一忙就慢几倍。
    return deepseek_export.load(out, 1, speculative_floor=False)


@pytest.fixture(scope="module")
def plain(demo: CompiledModel) -> Callable[[list[list[int]], int], list[list[int]]]:
    """逐个 token 解码的；与 K 无关，同样的一批只算一遍。"""

    @functools.cache
    def told(rows: tuple[tuple[int, ...], ...], steps: int) -> list[list[int]]:
        return demo.generate([list(row) for row in rows], steps, speculative=False, ignore_eos=True).token_ids

    return lambda rows, steps: told(tuple(map(tuple, rows)), steps)


@pytest.mark.parametrize(
    ("K", "prompts", "steps"),
    [(3, 5, 96), *(pytest.param(K, 20, 256, marks=pytest.mark.slow) for K in (1, 2, 3, 4))],
)
def test_demo_checkpoint_on_held_out_prompts(demo: CompiledModel, plain, K: int, prompts: int, steps: int):
    """MTP-2：留出的 prompt，batch 1 与长度不等的 batch 8 都逐 token 相同；20 条、256 个 token 的全套是 slow。"""
    assert demo.speculative is not None
    demo.speculative.num_draft_tokens = K
    texts = json.loads((CHECKPOINT / "heldout_prompts.json").read_text(encoding="utf-8"))
    assert len(texts) == 20
    rows = [demo.encode(text) for text in texts]
    batches = [[row] for row in rows[:prompts]] + [rows[start : start + 8] for start in range(0, prompts, 6)][
        :3
    ]
    tokens = calls = 0.0
    for batch in batches:
        drafted = demo.generate(batch, steps, ignore_eos=True)
        assert drafted.token_ids == plain(batch, steps)
        stats = drafted.speculation
        assert stats is not None
        if len(batch) == 1:
            tokens, calls = tokens + stats.tokens_per_call * stats.main_calls, calls + stats.main_calls
    if K == 3:
        assert tokens / calls >= 2.0  # 每次主模型调用至少两个 token
