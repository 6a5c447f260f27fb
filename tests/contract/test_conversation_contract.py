"""specs/serving 的 SERVE-50：一段对话。"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

import deepseek_export
from deepseek_export.errors import DsxError
from deepseek_export.model import CompiledModel
from deepseek_export.runtime import SamplingParams
from deepseek_export.serving import Conversation, Engine, EngineSettings

pytestmark = pytest.mark.contract

QUESTIONS = ("《论语》", "明月", "And God said")


@pytest.fixture(scope="module")
def alone(trained_bundle: Path) -> CompiledModel:
    """对照：不经过引擎。"""
    return deepseek_export.load(trained_bundle, threads=1)


@pytest.fixture(scope="module")
def model(trained_bundle: Path) -> CompiledModel:
    """归引擎用的。"""
    return deepseek_export.load(trained_bundle, threads=1)


@pytest.fixture
def engine(model: CompiledModel) -> Iterator[Engine]:
    """一行。"""
    with model.engine(EngineSettings(slots=1)) as one:
        yield one


def ask(conversation: Conversation, text: str) -> str:
    """一问的答案。"""
    return "".join(part.content for part in conversation.ask(text))


def rendered(model: CompiledModel, messages: list[dict[str, str]]) -> str:
    """套上模板。"""
    assert model.tokenizer is not None
    return model.tokenizer.apply_chat_template(messages)


def test_each_answer_continues_what_was_said(engine: Engine, alone: CompiledModel):
    """SERVE-50：每一问都与生成器单独续写整段对话相同；上文不重算。"""
    conversation = Conversation(engine, alone.tokenizer, max_new_tokens=24, system="诗")
    said = [{"role": "system", "content": "诗"}]
    for question in QUESTIONS:
        said.append({"role": "user", "content": question})
        want = alone.generate(rendered(alone, said), max_new_tokens=24).text
        assert [ask(conversation, question)] == want
        said.append({"role": "assistant", "content": want[0]})
        assert conversation.messages == said
    first, *later = conversation.stats
    assert first.cached_tokens == 0
    for before, after in zip(conversation.stats, later, strict=False):
        assert after.cached_tokens >= before.prompt_tokens
    assert all(one.first_s >= 0 and one.decode_s >= 0 for one in conversation.stats)


def test_reset_keeps_only_the_system_prompt(engine: Engine, alone: CompiledModel):
    """SERVE-50"""
    conversation = Conversation(engine, alone.tokenizer, max_new_tokens=12, system="诗")
    want = ask(conversation, QUESTIONS[0])
    ask(conversation, QUESTIONS[1])
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "诗"}]
    assert conversation.stats == []
    assert ask(conversation, QUESTIONS[0]) == want


def test_leaving_an_answer_keeps_what_was_given(engine: Engine, alone: CompiledModel):
    """SERVE-50：停下之后引擎里什么也没有，下一问接着说。"""
    conversation = Conversation(engine, alone.tokenizer, max_new_tokens=1000, ignore_eos=True)
    parts = conversation.ask(QUESTIONS[0])
    given = "".join(next(parts).content for _ in range(5))
    parts.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": given}
    assert conversation.stats[-1].new_tokens == 5
    assert conversation.stats[-1].reason == "cancelled"
    assert next(conversation.ask(QUESTIONS[1]))
    assert engine.stats.finished["cancelled"] >= 1


def test_stop_strings_and_sampling(engine: Engine, alone: CompiledModel):
    """SERVE-50：停止串不露出来；同一个种子，同一个答案。"""
    whole = ask(Conversation(engine, alone.tokenizer, max_new_tokens=24), QUESTIONS[0])
    stopped = Conversation(engine, alone.tokenizer, max_new_tokens=24, stops=[whole[4:6]])
    assert ask(stopped, QUESTIONS[0]) == whole[:4]
    assert stopped.stats[-1].reason == "stop"
    sampling = SamplingParams(temperature=0.9, seed=3)
    once, again = (
        ask(Conversation(engine, alone.tokenizer, sampling, max_new_tokens=12), QUESTIONS[2])
        for _ in range(2)
    )
    assert once == again


def test_thinking_is_not_part_of_what_was_said(engine: Engine, alone: CompiledModel):
    """SERVE-50：模板替回答开了头的，到 ``</think>`` 为止是思考。"""
    assert alone.tokenizer is not None
    said = rendered(alone, [{"role": "user", "content": "x"}]) + "<think>"
    with mock.patch.object(alone.tokenizer, "apply_chat_template", return_value=said):
        conversation = Conversation(engine, alone.tokenizer, max_new_tokens=12)
        parts = list(conversation.ask("x"))
    assert "".join(part.reasoning for part in parts)
    assert conversation.messages[-1]["content"] == "".join(part.content for part in parts)


def test_a_failed_question_changes_nothing(engine: Engine, alone: CompiledModel):
    """SERVE-50：太长的当场拒绝，上文不变，还能接着问。"""
    conversation = Conversation(engine, alone.tokenizer, max_new_tokens=8)
    ask(conversation, QUESTIONS[0])
    before = list(conversation.messages)
    with pytest.raises(DsxError, match="DSX-E511"):
        ask(conversation, "长" * 3000)
    assert conversation.messages == before
    assert ask(conversation, QUESTIONS[1])


def test_what_cannot_talk_is_refused_at_once(engine: Engine, alone: CompiledModel):
    """SERVE-50：没有 tokenizer，停止串不对，模板渲染不了。"""
    with pytest.raises(DsxError, match="DSX-E514"):
        Conversation(engine, None)
    with pytest.raises(DsxError, match="DSX-E512"):
        Conversation(engine, alone.tokenizer, stops=[""])
    assert alone.tokenizer is not None
    broken = DsxError("DSX-E502", "没有", "放进来")
    with (
        mock.patch.object(alone.tokenizer, "apply_chat_template", side_effect=broken),
        pytest.raises(DsxError, match="DSX-E502"),
    ):
        Conversation(engine, alone.tokenizer)
