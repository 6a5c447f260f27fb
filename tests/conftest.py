"""各测试共用的夹具；重的依赖只在用到时导入。"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[[str], tuple[Any, Any]]:
    """变体名 → (transformers 模型, 它存成的 :class:`Checkpoint`)，各建一次。"""
    from deepseek_export.checkpoint import Checkpoint
    from tests.models import build_model, save_checkpoint

    @functools.cache
    def build(variant: str):
        model = build_model(variant)
        return model, Checkpoint.open(save_checkpoint(model, tmp_path_factory.mktemp(variant)))

    return build
