"""specs/export 对各模型家族的承诺：白名单里的每一个都与 transformers 相等。"""

from __future__ import annotations

import pytest
import torch

import deepseek_export
from deepseek_export.checkpoint.families import FAMILIES
from deepseek_export.parity.oracle import TransformersOracle
from tests.models import TOLERANCE, VARIANTS, distance

pytestmark = pytest.mark.contract


def test_every_family_is_compared_with_transformers():
    """EXPORT-30：白名单里的每个家族都有变体，参考模型逐个与 transformers 比（tests/unit/test_reference.py）。"""
    assert {family for family, _ in VARIANTS.values()} == set(FAMILIES)


def test_a_renamed_family_has_its_oracle(saved):
    """EXPORT-30：kimi_k2 在 transformers 里没有自己的实现，基准就是 deepseek_v3 的那一个，读同一个目录。"""
    model, checkpoint = saved("kimi")
    ids = list(range(3, 40))
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    assert distance(TransformersOracle(checkpoint, "float32").logits(ids), want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("variant", "profile"),
    [pytest.param("kimi", "mla+moe", marks=pytest.mark.slow), ("minicpm3", "mla")],
)
def test_bundles_of_other_families_pass(exported, variant: str, profile: str):
    """EXPORT-30：model_type 另起名字的（kimi_k2）与多出缩放的（minicpm3），整个 bundle 与 transformers 自己的模型相等。"""
    bundle = exported(variant, profile)
    assert bundle.manifest.model.family == VARIANTS[variant][0]
    report = deepseek_export.verify(bundle.path, levels=["block", "model", "tokens"], steps=8)
    assert report.passed, report.first_failure
    assert report.oracle.startswith("transformers")
    assert {case.level for case in report.cases} == {"block", "model", "tokens"}
