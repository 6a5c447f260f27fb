"""specs/parity 的 PARITY-14：float16 的 bundle，激活溢出就不通过，并说是哪里。"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import deepseek_export
from deepseek_export.bundle import Bundle
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.cli.verify import command as verify_command
from tests.models import build_model, save_checkpoint

pytestmark = [pytest.mark.contract, pytest.mark.heavy]


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory) -> Path:
    """权重都放得进 float16，第 1 层前馈的输出放不进。"""
    model = build_model("v2-lite")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("model.layers.1.mlp") and "down_proj" in name:
                weight.mul_(3e4 / weight.abs().max())
            elif name.startswith("model.layers.1.mlp") and ("gate_up" in name or "up_proj" in name):
                weight.mul_(100)
    return save_checkpoint(model, tmp_path_factory.mktemp("overflowing"))


def test_an_overflow_fails_and_says_where(overflowing: Path, tmp_path: Path):
    """PARITY-14：激活溢出的 float16 bundle 不通过，第一处不通过就是它，指名模块与出路；同一个检查点的 float32 bundle 不量它，通过。"""
    bundle = deepseek_export.export(overflowing, tmp_path / "half", "mla+moe", dtype="float16")
    report = deepseek_export.verify(bundle.path, levels=["model"])
    assert not report.passed
    failure = report.first_failure
    assert failure is not None
    assert failure.level == "activations"
    found = report.activations
    assert found is not None
    assert found.largest is None
    assert found.where.startswith("layers.1.mlp")
    assert "65504" in failure.note
    assert "bfloat16" in failure.note
    result = CliRunner().invoke(verify_command, [str(bundle.path), "--level", "model"])
    assert result.exit_code == 1
    assert f"激活    {found.sentence}" in result.output
    whole = deepseek_export.export(overflowing, tmp_path / "whole", "mla+moe")
    report = deepseek_export.verify(whole.path, levels=["model"])
    assert report.passed, report.first_failure
    assert report.activations is None


def test_a_model_that_fits_says_how_far_it_is(exported, tmp_path: Path):
    """PARITY-14：放得下的写明最大的激活、在哪里、走了多少个 token；报告里也有。"""
    bundle: Bundle = exported("v3-yarn", "mla+moe", dtype="float16")
    report = deepseek_export.verify(bundle.path, levels=["model"])
    assert report.passed, report.first_failure
    assert report.levels == ["activations", "model"]
    found = report.activations
    assert found is not None
    assert found.largest is not None
    assert 0 < found.largest < found.limit == torch.finfo(torch.float16).max
    assert found.where
    assert found.tokens == sum((29, 16, 5))
    assert found.source == "随机的 token"


def test_real_text_is_looked_at_too(tmp_path: Path):
    """PARITY-14：给了文本，float16 的 bundle 不必量化也收下它，激活也在它上面看。"""
    text = tmp_path / "text.txt"
    text.write_text("And God said, Let there be light: and there was light.\n" * 20, encoding="utf-8")
    bundle = deepseek_export.export(CHECKPOINT, tmp_path / "half", "mla+moe", dtype="float16")
    prompts = ["床前明月光"]
    few = deepseek_export.verify(bundle.path, levels=["model"], prompts=prompts).activations
    more = deepseek_export.verify(bundle.path, levels=["model"], prompts=prompts, text=text).activations
    assert few is not None
    assert more is not None
    assert (few.source, more.source) == ("prompt", f"prompt 与 {text}")
    assert more.tokens > few.tokens + 100
    assert more.largest is not None
    assert few.largest is not None
    assert more.largest >= few.largest
