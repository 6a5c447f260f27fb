"""约束输出的处理器：只由序列决定，退得回去；该结束时只许 eos；算不下去的说得出来。"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import ModuleSpec
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.errors import DsxError
from deepseek_export.formats import limits
from deepseek_export.formats.grammar import GrammarProcessor, Grammars, regex_grammar, thought_rule
from deepseek_export.formats.lark import choice, schema_grammar, speller, text_kind, text_pattern
from deepseek_export.runtime import BundleTokenizer
from deepseek_export.runtime.sampling import RowSampler, SamplingParams

pytestmark = pytest.mark.unit

loaded = BundleTokenizer.load(CHECKPOINT)
assert loaded is not None
TOKENIZER = loaded
VOCAB, EOS = 800, 1  # logits 比词表宽
GRAMMARS = Grammars(TOKENIZER.source, VOCAB, [EOS])
PERSON = schema_grammar(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 3}, "ages": {"type": "array", "maxItems": 2}},
        "required": ["name"],
        "additionalProperties": False,
    }
)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.source.encode(text, add_special_tokens=False).ids


def allowed(processor: GrammarProcessor, tokens: list[int]) -> set[int]:
    return set(np.flatnonzero(np.isfinite(processor(np.zeros(VOCAB), tokens))).tolist())


@settings(deadline=None)
@given(st.data())
def test_the_mask_depends_on_the_sequence_alone(data):
    """乱走、退回、跳到别的分支，每一处许的都与从头问的相同。"""
    compiled = GRAMMARS.compile(PERSON)
    wandering = compiled.processor(2)
    path: list[int] = []
    for _ in range(data.draw(st.integers(1, 12))):
        path = path[: data.draw(st.integers(0, len(path)))]
        for _ in range(data.draw(st.integers(0, 3))):
            nexts = sorted(allowed(compiled.processor(2), [7, 8, *path]))
            path.append(data.draw(st.sampled_from(nexts)))
        assert allowed(wandering, [7, 8, *path]) == allowed(compiled.processor(2), [7, 8, *path])
    assert wandering.failure(path) is None


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_sampling_ends_with_what_the_grammar_takes(seed: int):
    """随便的 logits，最后都是合乎正则的文本，以 eos 结束。"""
    pattern = "(ab|cd){2,3}(。|！)"
    sampler = RowSampler(
        SamplingParams(temperature=1, seed=seed),
        processors=[GRAMMARS.compile(regex_grammar(f"^{pattern}$")).processor(1)],
    )
    scores, tokens = np.random.default_rng(seed), [5]
    while tokens[-1] != EOS:
        tokens.append(sampler.pick(scores.standard_normal(VOCAB) * 3, len(tokens), tokens))
        assert len(tokens) < 40
    assert re.fullmatch(pattern, TOKENIZER.decode(tokens[1:]))


def test_eos_only_where_the_grammar_may_end_and_nothing_else_where_it_must():
    """可以结束的地方许 eos；必须结束的地方、结束了还要往下走（ignore_eos）时，只许 eos。"""
    processor = GRAMMARS.compile(regex_grammar("a{1,2}")).processor(0)
    one = ids_of("a")
    assert EOS not in allowed(processor, [])
    assert allowed(processor, one) >= {EOS, *one}
    assert allowed(processor, one * 2) == {EOS}
    assert allowed(processor, [*one, EOS]) == {EOS}
    assert allowed(processor, [*one, EOS, EOS]) == {EOS}
    assert allowed(processor, one) >= {EOS, *one}


def test_ids_beyond_the_vocabulary_are_never_allowed():
    """logits 比词表宽的那几个永远不许；别的特殊 token 也不许。"""
    assert max(allowed(GRAMMARS.compile(regex_grammar("(.|\\n)*")).processor(0), [])) < 768
    assert not {0, 2, 3} & allowed(GRAMMARS.compile(regex_grammar("(.|\\n)*")).processor(0), [])


def test_a_grammar_that_fights_other_processors_fails_by_code():
    """DSX-E762：许的都被屏蔽了，之后只许 eos，原因留着。"""
    processor = GRAMMARS.compile(choice(["a"])).processor(0)
    scores = np.zeros(VOCAB)
    scores[ids_of("a")] = -np.inf
    assert np.flatnonzero(np.isfinite(processor(scores, []))).tolist() == [EOS]
    failure = processor.failure([EOS])
    assert failure is not None
    with pytest.raises(DsxError, match="DSX-E762"):
        raise failure


def test_a_dead_end_of_a_rejected_draft_is_forgotten():
    """走不下去的是丢掉了的草稿：换一条序列照常，与从头问的相同，也不算失败。"""
    compiled = GRAMMARS.compile(choice(["ab", "cd"]))
    processor = compiled.processor(0)
    a, b, c = ids_of("a"), ids_of("b"), ids_of("c")
    scores = np.zeros(VOCAB)
    scores[[*b, *ids_of("ab")]] = -np.inf
    assert np.flatnonzero(np.isfinite(processor(scores, a))).tolist() == [EOS]
    assert processor.failure([*a, EOS]) is not None
    assert processor.failure(c) is None
    assert allowed(processor, c) == allowed(compiled.processor(0), c)
    assert processor.failure([*a, EOS]) is None


def test_running_out_of_fuel_fails_that_request_only():
    """DSX-E762：中途超出每一步的限额。"""

    class Exhausted:
        def deep_copy(self) -> Exhausted:
            return self

        def is_stopped(self) -> bool:
            return True

        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "too complex"

    processor = GrammarProcessor(Exhausted(), VOCAB, [EOS], 0)  # type: ignore[arg-type]
    assert allowed(processor, []) == {EOS}
    assert "too complex" in str(processor.failure([EOS]))


@pytest.mark.parametrize(
    "lark",
    [
        "start: nothing",
        "start: /(/",
        schema_grammar({"type": "foo"}),
        schema_grammar({"$ref": "#"}),
        schema_grammar({"type": "array", "uniqueItems": True}),
        "x" * (limits.MAX_LENGTH + 1),
        "start: " + "(" * 20_000 + '"a"' + ")" * 20_000,
    ],
)
def test_bad_grammars_are_refused(lark: str):
    """DSX-E760"""
    with pytest.raises(DsxError, match="DSX-E760"):
        GRAMMARS.compile(lark)


def test_hostile_schemas_end_soon():
    """限额是确定的：很大的重复要么编译得成、掩码算得出，要么按码拒绝。"""
    for schema in (
        {"type": "string", "pattern": "((a{0,1000}){0,1000}){0,1000}"},
        {"type": "array", "minItems": 10**7, "items": {"type": "string", "maxLength": 10**9}},
        {"anyOf": [{"properties": {f"k{i}": {"pattern": f"^{i}+$"}}} for i in range(500)]},
        {"enum": [f"{i}" * 20 for i in range(5000)]},
    ):
        with suppress(DsxError):
            assert allowed(GRAMMARS.compile(schema_grammar(schema)).processor(0), [])


def chained(levels: int) -> dict[str, Any]:
    """``$ref`` 一个接一个。"""
    definitions: dict[str, Any] = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{levels}": {"type": "string"}}}


def nested(levels: int) -> dict[str, Any]:
    """一层套一层。"""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def rule_chain(count: int) -> str:
    """规则一个接一个。"""
    rules = [f'r{i}: r{i + 1} | "a"' for i in range(count)]
    return "\n".join(["start: r0", *rules, f'r{count}: "b"'])


@pytest.mark.parametrize(
    ("check", "given"),
    [
        (limits.check_schema, chained(1500)),
        (limits.check_schema, chained(30_000)),
        (limits.check_schema, nested(900)),
        (limits.check_schema, {"properties": {f"k{i}": {} for i in range(6000)}}),
        (limits.check_schema, {"pattern": "a?" * 3000}),
        (
            limits.check_schema,
            {"anyOf": [{"pattern": "a?" * 1000}] * 1 + [{"pattern": "b?" * 2000} for _ in range(9)]},
        ),
        (limits.check_lark, rule_chain(9000)),
        (limits.check_lark, rule_chain(900)),
        (limits.check_lark, "start: " + "(" * 900 + '"a"' + ")" * 900),
        (limits.check_lark, "start: /" + "a?" * 3000 + "/"),
        (limits.check_regex, "a?" * 3000),
    ],
)
def test_what_llguidance_cannot_bear_never_reaches_it(check: Callable[[Any], None], given: Any):
    """DSX-E760：这些会让它栈溢出（进程就没了），或算上几秒。"""
    with pytest.raises(DsxError, match="DSX-E760"):
        check(given)


def test_what_passes_the_limits_is_borne():
    """恰在限额之内的编译得成，掩码算得出；指回自己的也是。"""
    loop = {
        "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}},
        "$ref": "#/$defs/n",
    }
    for schema in (chained(45), nested(120), {"properties": {f"k{i}": {} for i in range(900)}}, loop, True):
        limits.check_schema(schema)
        with suppress(DsxError):
            assert allowed(GRAMMARS.compile(schema_grammar(schema)).processor(0), [])
    for lark in (rule_chain(700), "start: " + "(" * 700 + '"a"' + ")" * 700, "start: /" + "a?" * 1900 + "/"):
        limits.check_lark(lark)
        with suppress(DsxError):
            assert allowed(GRAMMARS.compile(lark).processor(0), [])


def test_models_without_eos_and_machines_without_llguidance():
    """DSX-E763、DSX-E761"""
    with pytest.raises(DsxError, match="DSX-E763"):
        Grammars(TOKENIZER.source, VOCAB, []).compile(choice(["a"]))
    found = mock.patch("deepseek_export.extras.find_spec", without_llguidance)
    with found, pytest.raises(DsxError, match=r"(?s)DSX-E761.*llguidance"):
        Grammars(TOKENIZER.source, VOCAB, [EOS])


def without_llguidance(name: str) -> ModuleSpec | None:
    return None if name == "llguidance" else ModuleSpec(name, None)


def test_the_cache_of_compiled_grammars_is_bounded():
    """留着的与新编译的一样，多了就忘掉最久没有用的。"""
    one = Grammars(TOKENIZER.source, VOCAB, [EOS])
    with mock.patch("llguidance.LLMatcher", wraps=LLMatcher) as compiled:
        for number in [*range(40), 39, 0]:
            assert allowed(one.compile(choice([f"{number}"])).processor(0), [])
    assert compiled.call_count == 41  # 39 还在，0 已经忘了


@pytest.mark.parametrize("begun", [True, False])
def test_thinking_comes_first(begun: bool):
    """思考随便写，``</think>`` 之后才照语法；提示词没有开头的，可想可不想。"""
    processor = GRAMMARS.compile(choice(["甲"]), thought_rule(speller({}), begun)).processor(0)
    start = "" if begun else "<think>"
    tokens = ids_of(f"{start}随便 {{}} <think\n</think>\n\n甲")
    for at, token in enumerate([*tokens, EOS]):
        assert token in allowed(processor, tokens[:at])
    straight = ids_of("甲")
    assert (EOS in allowed(processor, straight)) is not begun


def test_special_tokens_are_spelled_by_id():
    """标记里的特殊 token 写成 id，别的写成字符串。"""
    spell = speller({"｜DSML｜": 5, "<｜DSML｜>": 6})
    assert spell("</｜DSML｜a>\n") == '"</" <[5]> "a>\\n"'
    assert spell("<｜DSML｜>") == "<[6]>"
    assert spell("") == ""


@pytest.mark.parametrize(
    ("schema", "kinds"),
    [
        ({"type": "string"}, (True, False)),
        ({"type": ["string", "null"]}, (True, True)),
        ({"type": "integer"}, (False, True)),
        ({"enum": ["a", 1]}, (True, True)),
        ({"const": "a"}, (True, False)),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, (True, True)),
        ({"$ref": "#/$defs/s"}, (True, False)),
        ({"$ref": "#/$defs/missing"}, (True, True)),
        ({"$ref": "#/$defs/loop"}, (True, True)),
        ({"$ref": "#/$defs/tree"}, (True, True)),
        ({"enum": 3}, (True, True)),
        ({}, (True, True)),
        (True, (True, True)),
    ],
)
def test_which_values_are_written_raw(schema: Any, kinds: tuple[bool, bool]):
    """裸的文本还是 JSON，看 schema。"""
    root = {"$defs": {"s": {"type": "string"}, "loop": {"$ref": "#/$defs/loop"}}}
    root["$defs"]["tree"] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/tree"}]}
    assert text_kind(schema, root) == kinds


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"enum": ["a.b", "c"]}, "a.b", "axb"),
        ({"const": "x/y"}, "x/y", "x"),
        ({"minLength": 2, "maxLength": 3}, "ab", "abcd"),
        ({"pattern": "^a+$"}, "aa", "ab"),
        ({"pattern": "b"}, "abc", "ac"),
        ({}, "任意\n", None),
    ],
)
def test_raw_strings_keep_to_their_schema(schema: dict, good: str, bad: str | None):
    """裸的字符串也合乎 enum、长度与 pattern。"""
    pattern = text_pattern(schema).replace(r"\/", "/")
    assert re.fullmatch(pattern, good)
    assert bad is None or not re.fullmatch(pattern, bad)
