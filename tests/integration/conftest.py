"""真检查点与真 bundle，各造一次。"""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_export.checkpoint.synthetic import write_checkpoint, write_demo_checkpoint
from tests.integration.cli import TINY, dsx


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """float32、没有 tokenizer 的最小检查点。"""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "ckpt", TINY, dtype="float32")


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """演示检查点，带 tokenizer。"""
    return write_demo_checkpoint(tmp_path_factory.mktemp("demo") / "ckpt")


@pytest.fixture(scope="session")
def tiny_bundle(tiny, tmp_path_factory) -> Path:
    """tiny 的 baseline。"""
    out = tmp_path_factory.mktemp("tiny-bundle") / "out"
    process = dsx("export", tiny, "-o", out)
    assert process.returncode == 0, process.stderr
    return out


@pytest.fixture(scope="session")
def demo_bundle(demo, tmp_path_factory) -> Path:
    """演示检查点的 mla+moe。"""
    out = tmp_path_factory.mktemp("demo-bundle") / "out"
    process = dsx("export", demo, out, "-p", "mla+moe")
    assert process.returncode == 0, process.stderr
    return out
