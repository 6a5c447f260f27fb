"""perf 的 quant 套件：困惑度之比与散布怎么算，场景说得通不通。测量本身不在测试里跑。"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from perf import gates
from perf.suites.quant import (
    DIVERGENCE,
    DIVERGENCE_RATIO,
    FULL,
    PERPLEXITIES,
    QUICK,
    calibrated_name,
    case_name,
)
from perf.workload.perplexity import Losses, losses, predictions, windows
from tests.perf_runs import spread

pytestmark = pytest.mark.unit


class _Model:
    """logits 由 token 定的模型。"""

    def __init__(self, seed: int) -> None:
        self.table = np.random.default_rng(seed).standard_normal((50, 50)).astype(np.float32)

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.table[ids]


def test_losses_are_cross_entropies_and_divergences():
    """每个 token 由它之前的预测，每窗的第一个不计；KL 散度是没有量化的对它的。"""
    texts = {"a": [[3, 1, 4, 1, 5], [9, 2, 6]]}
    plain = predictions(_Model(0), texts)
    found, same = losses(_Model(1), texts, plain), losses(_Model(0), texts, plain)
    for number, part in enumerate(texts["a"]):
        mine, theirs = (torch.from_numpy(_Model(seed).table)[part[:-1]] for seed in (1, 0))
        loss = functional.cross_entropy(mine, torch.tensor(part[1:]), reduction="sum")
        divergence = functional.kl_div(
            mine.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True
        )
        assert found.loss["a"][number] == pytest.approx(loss.item(), rel=1e-5)
        assert found.divergence["a"][number] == pytest.approx(divergence.item(), rel=1e-5)
    assert found.tokens["a"].tolist() == [4, 2]
    assert found.perplexity(["a"]) == pytest.approx(math.exp(found.loss["a"].sum() / 6))
    assert same.divergence_per_token(["a"]) == spread(0.0)
    assert same.perplexity_ratio(same, ["a"]) == spread(1.0)


def test_ratios_are_paired_by_window():
    """只看同一窗上的差：处处差一点，区间窄，真的值在里面；长短不一的窗按 token 算。"""
    rng = np.random.default_rng(3)
    tokens = rng.integers(100, 200, 60)
    hard = rng.normal(3, 1, 60) * tokens
    gaps = rng.normal(0.02, 0.01, 60) * tokens

    def parted(values: np.ndarray) -> dict[str, np.ndarray]:
        return {"a": values[:20], "b": values[20:]}

    plain = Losses(parted(hard), parted(0 * hard), parted(tokens))
    worse = Losses(parted(hard + gaps), parted(gaps + tokens), parted(tokens))
    found = worse.perplexity_ratio(plain, ["a", "b"])
    assert 1 < found.low < found.median < found.high < 1.04
    assert found.low < math.exp(0.02) < found.high
    assert found.median == pytest.approx(worse.perplexity(["a", "b"]) / plain.perplexity(["a", "b"]))
    assert worse.divergence_per_token(["a"]).median == pytest.approx(1.02, abs=0.01)
    assert worse.divergence_ratio(worse, ["b"]) == spread(1.0)


def test_windows_do_not_overlap_and_are_spread_evenly():
    assert windows(range(10), 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert windows(range(100), 10, 3) == [list(range(at, at + 10)) for at in (0, 30, 60)]
    assert windows(range(2), 3) == []


def test_gates_name_what_the_suite_makes():
    """PARITY-21：门槛要的格子与比值，完整的场景里都有；缩小的场景里只有没有标明 ``full`` 的。"""
    made = {case_name(*one) for one in FULL.formats} | {calibrated_name(*one) for one in FULL.calibrated}
    quick = {case_name(*one) for one in QUICK.formats}
    ratios = {
        "大小",
        "logits 的相对误差",
        "路由分叉之前的相对误差",
        *PERPLEXITIES,
        DIVERGENCE,
        DIVERGENCE_RATIO,
    }
    wanted = [gate for gate in gates.load_gates().gates if gate.suite == "quant"]
    assert all(any(name.startswith(gate.case) for name in made) for gate in wanted)
    assert {gate.case for gate in wanted if not gate.full} <= quick
    assert {gate.ratio for gate in wanted} <= ratios
