"""``CompiledModel.generate`` 的提示词写错了：说是哪一个、怎么写。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deepseek_export import api
from deepseek_export.errors import DsxError
from deepseek_export.model import CompiledModel

pytestmark = pytest.mark.unit

MESSAGES = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def model(v3_bundle) -> CompiledModel:
    return api.load(v3_bundle.path)


@pytest.mark.parametrize(
    ("prompts", "options", "what", "todo"),
    [
        (None, {}, "prompts 是 None（NoneType）", "床前明月光"),
        (3, {}, "prompts 是 3（int）", "[[1, 2, 3]]"),
        (b"abc", {}, "prompts 是", "床前明月光"),
        ([1, 2, 3], {}, "prompts[0] 是 1（int）", "[[1, 2, 3]]；一条也要套一层列表"),
        ([[1], 2], {}, "prompts[1] 是 2", "[[1, 2, 3]]"),
        ([[1, "2"]], {}, "prompts[0][1] 是 '2'（str）", "[[1, 2, 3]]"),
        ([[1, 2.5]], {}, "prompts[0][1] 是 2.5（float）", "[[1, 2, 3]]"),
        (MESSAGES, {"chat": True}, "prompts[0] 是 {", "apply_chat_template(messages)"),
        (MESSAGES[0], {}, "prompts 是 {", "apply_chat_template(messages)"),
        ([MESSAGES], {}, "prompts[0][0] 是 {", "apply_chat_template(messages)"),
        ([[1, 2]], {"chat": True}, "chat=True，而 prompts[0] 是 token id", "chat=True 给文本"),
    ],
)
def test_prompts_of_another_kind_are_refused(
    model, prompts: Any, options: dict[str, Any], what: str, todo: str
):
    with pytest.raises(DsxError) as error:
        model.generate(prompts, 2, **options)
    assert error.value.code == "DSX-E702"
    assert what in error.value.what
    assert todo in error.value.todo


def test_arrays_and_tensors_of_ids_are_rows(model):
    """numpy、torch 的二维整数就是几条 token id。"""
    want = model.generate([[3, 1], [4, 1]], 3).token_ids
    for rows in (np.array([[3, 1], [4, 1]]), torch.tensor([[3, 1], [4, 1]]), ((3, 1), (4, 1))):
        assert model.generate(rows, 3).token_ids == want


@pytest.mark.parametrize("threads", [0, -1, True, "2", 1.5])
def test_threads_of_another_kind_are_refused(model, threads: Any):
    with pytest.raises(DsxError, match="threads=") as error:
        api.load(model.bundle.path, threads)
    assert error.value.code == "DSX-E512"


def test_a_stop_string_without_a_tokenizer(model):
    """一个停止串也可以不套列表。"""
    with pytest.raises(DsxError) as error:
        model.generate([[3, 1]], 2, stop="ab")
    assert error.value.code == "DSX-E514"
    assert "'ab'" in error.value.what
