"""工具调用的各种格式：公布的例子读得出来，写出来的读回去相同，怎么切段都一样，语法收下自己写的。"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deepseek_export.errors import DsxError
from deepseek_export.formats.calls import Tool, ToolCall, ToolFormat
from deepseek_export.formats.chat import TOOL_FORMATS, find_tool_format, prepared
from deepseek_export.formats.grammar import Grammar, Grammars
from deepseek_export.formats.lark import speller
from deepseek_export.runtime import BundleTokenizer
from deepseek_export.serving.http.formats import ModelFormats
from deepseek_export.serving.http.schemas import ChatRequest

pytestmark = pytest.mark.unit

WEATHER = Tool(
    "get_weather",
    "天气",
    {
        "type": "object",
        "properties": {
            "location": {"type": "string"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer"},
            "detail": {"type": ["object", "null"]},
        },
        "required": ["location"],
        "additionalProperties": False,
    },
)
PLAIN = Tool("now")
TOOLS = [WEATHER, PLAIN]
CALLS = [
    ToolCall("", "get_weather", '{"location": "杭州 </b> \\"西湖\\"\\n{}", "unit": "celsius", "days": 3}'),
    ToolCall("", "now", "{}"),
    ToolCall("", "get_weather", '{"location": "```x```", "detail": null}'),
]


def read(style: ToolFormat, pieces: Iterable[str]) -> tuple[str, list[ToolCall], list[bool]]:
    """正文、调用、各次调用完没完。"""
    parser, content = style.parser(TOOLS), ""
    calls: dict[int, ToolCall] = {}
    done: dict[int, bool] = {}
    for parsed in [*(parser.feed(piece) for piece in pieces), parser.flush()]:
        content += parsed.content
        for one in parsed.calls:
            old = calls.get(one.index, ToolCall("", "", ""))
            calls[one.index] = ToolCall(one.id or old.id, one.name or old.name, old.arguments + one.arguments)
            done[one.index] = done.get(one.index, False) or one.done
    return content, list(calls.values()), list(done.values())


def same(calls: Sequence[ToolCall], want: Sequence[ToolCall]) -> bool:
    """名字与参数相同，不管 JSON 怎么排。"""
    return [(one.name, json.loads(one.arguments)) for one in calls] == [
        (one.name, json.loads(one.arguments)) for one in want
    ]


#: 各模型的文档、模型卡里的例子。
PUBLISHED = [
    (
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"location": "Tokyo"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n'
        "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [("get_weather", {"location": "Tokyo"}), ("now", {})],
    ),
    (
        "deepseek_v31",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"location": "杭州"}'
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [("get_weather", {"location": "杭州"}), ("now", {})],
    ),
    (
        "deepseek_v32",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="location" string="true">Hangzhou</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        [("get_weather", {"location": "Hangzhou", "days": 3})],
    ),
    (
        "deepseek_v32",  # V4 换了外面的名字
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
        [("now", {})],
    ),
    (
        "glm45",
        "<tool_call>get_weather\n<arg_key>location</arg_key>\n<arg_value>Beijing</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        [("get_weather", {"location": "Beijing", "days": 3})],
    ),
    (
        "glm47",
        "<tool_call>get_weather<arg_key>location</arg_key><arg_value>42</arg_value></tool_call>"
        "<tool_call>now</tool_call>",
        [("get_weather", {"location": "42"}), ("now", {})],  # schema 说是字符串
    ),
    (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"location": "Beijing"}<|tool_call_end|><|tool_calls_section_end|>',
        [("get_weather", {"location": "Beijing"})],
    ),
]


@pytest.mark.parametrize(("name", "text", "want"), PUBLISHED)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_published_examples(name: str, text: str, want: list, size: int):
    """前面有正文的也是；正文与调用之间的空白不算。"""
    whole = "我查一下。\n\n" + text
    content, calls, done = read(
        TOOL_FORMATS[name], [whole[at : at + size] for at in range(0, len(whole), size)]
    )
    assert content == "我查一下。"
    assert [(call.name, json.loads(call.arguments)) for call in calls] == want
    assert all(done)


def test_kimi_ids_are_the_ones_in_the_text():
    """Kimi 要在历史里看到自己写的 id。"""
    _, calls, _ = read(TOOL_FORMATS["kimi_k2"], [PUBLISHED[-1][1]])
    assert calls[0].id == "functions.get_weather:0"


names = st.sampled_from([tool.name for tool in TOOLS])
leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=12)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2), max_leaves=4)
argument_sets = st.fixed_dictionaries(
    {"location": st.text(max_size=20)},
    optional={"unit": st.sampled_from(["celsius", "fahrenheit"]), "days": st.integers(), "detail": values},
)


@pytest.mark.parametrize("style", TOOL_FORMATS.values(), ids=TOOL_FORMATS)
@given(data=st.data())
def test_what_is_written_reads_back_however_it_is_cut(style: ToolFormat, data):
    """参数里有什么字都行，只要不是格式自己的标记。"""
    arguments = data.draw(st.lists(st.tuples(names, argument_sets), min_size=1, max_size=3))
    calls = [ToolCall("", name, json.dumps(one, ensure_ascii=False)) for name, one in arguments]
    text = "说明。" + style.encode(calls)
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    content, got, done = read(style, pieces)
    assert content == "说明。"
    assert all(done)
    if style.object_arguments:  # GLM 不写类型：schema 说不准的，像 JSON 的就当 JSON
        want = [(one.name, json.loads(one.arguments)) for one in calls]
        for (name, left), right in zip(want, got, strict=True):
            assert name == right.name
            assert (
                left.get("location", "") == json.loads(right.arguments).get("location", "") or name == "now"
            )
    else:
        assert same(got, calls)


@pytest.mark.parametrize("style", TOOL_FORMATS.values(), ids=TOOL_FORMATS)
@given(at=st.integers(0, 400))
def test_an_answer_cut_short_loses_nothing_readable(style: ToolFormat, at: int):
    """断在哪里都不出错；断在名字之前的原样算正文，没有写完的调用不算完。"""
    text = style.encode(CALLS)
    content, calls, done = read(style, [text[: min(at, len(text) - 1)]])
    assert len(calls) <= len(CALLS)
    assert same(calls[: sum(done)], CALLS[: sum(done)])
    if not calls:
        assert content == text[: min(at, len(text) - 1)].rstrip() or style.opening in content


@given(st.text(max_size=60), st.integers(0, 60))
def test_text_without_calls_is_untouched(text: str, cut: int):
    """没有调用的回答一个字也不少。"""
    for style in TOOL_FORMATS.values():
        assert read(style, [text[:cut], text[cut:]]) == (text, [], [])


def bridged(special: Sequence[str]) -> tuple[Tokenizer, Grammars]:
    """一个字节一个 token 的分词器，另有几个特殊 token。"""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    one = Tokenizer(models.BPE(vocab={char: at for at, char in enumerate(alphabet)}, merges=[]))
    one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = decoders.ByteLevel()
    one.add_special_tokens(["<eos>", *special])
    return one, Grammars(one, one.get_vocab_size(), [one.token_to_id("<eos>")])


def accepts(tokenizer: Tokenizer, grammars: Grammars, lark: str, text: str) -> bool:
    """语法收下 ``text``，而且可以到此为止。"""
    return follows(tokenizer, grammars.compile(lark), text)


def follows(tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    """同上；逐个 token 问。"""
    processor = grammar.processor(0)
    ids = [*tokenizer.encode(text).ids, tokenizer.token_to_id("<eos>")]
    return all(
        np.isfinite(processor(np.zeros(tokenizer.get_vocab_size()), ids[:at])[token])
        for at, token in enumerate(ids)
    )


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("style", TOOL_FORMATS.values(), ids=TOOL_FORMATS)
def test_the_grammar_takes_what_is_written_and_nothing_else(style: ToolFormat, special: bool):
    """标记是特殊 token 的、是普通文本的都行；参数不合 schema 的不收。"""
    tokenizer, grammars = bridged(style.markers if special else ())
    spell = speller({one: tokenizer.token_to_id(one) for one in style.markers} if special else {})

    def lark(parallel: bool) -> str:
        return f"start: {spell(style.opening)} calls\n{style.rules(TOOLS, parallel, spell)}"

    one = [ToolCall("", "get_weather", '{"location": "a<b>/ 杭州", "unit": "celsius", "days": 3}')]
    many = [*one, ToolCall("", "now", "{}"), *one]
    assert accepts(tokenizer, grammars, lark(True), style.encode(many))
    assert accepts(tokenizer, grammars, lark(False), style.encode(one))
    assert not accepts(tokenizer, grammars, lark(False), style.encode(many))
    for bad in (
        '{"location": "a", "unit": "kelvin"}',
        '{"unit": "celsius"}',
        '{"location": "a", "days": 1.5}',
    ):
        assert not accepts(tokenizer, grammars, lark(True), style.encode([ToolCall("", "get_weather", bad)]))
    assert not accepts(tokenizer, grammars, lark(True), style.encode([ToolCall("", "other", "{}")]))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("style", TOOL_FORMATS.values(), ids=TOOL_FORMATS)
def test_strict_tools_leave_plain_text_alone(style: ToolFormat, special: bool):
    """不必调用时，随便什么文本都行；一旦开始调用，参数就要合乎 schema。"""
    tokenizer, _ = bridged(style.markers if special else ())
    eos = tokenizer.token_to_id("<eos>")
    formats = ModelFormats(BundleTokenizer(tokenizer, {}, "x"), tokenizer.get_vocab_size(), [eos], style.name)
    function = {"name": "get_weather", "parameters": WEATHER.parameters, "strict": True}
    tools = [{"type": "function", "function": function}]
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "tools": tools})
    grammar = formats.grammar(None, body, "x")
    assert grammar is not None
    good = style.encode([ToolCall("", "get_weather", '{"location": "a", "days": 3}')])
    for text in ("你好 <x> < 1", "", good, "说。\n\n" + good):
        assert follows(tokenizer, grammar, text)
    assert not follows(tokenizer, grammar, "x" + style.encode([ToolCall("", "get_weather", '{"days": 3}')]))


def test_the_format_shows_in_the_template_or_the_vocabulary():
    """看不出来就是没有。"""

    def found(template: str | None, *tokens: str) -> str | None:
        style = find_tool_format(template, lambda token: token in tokens)
        return None if style is None else style.name

    assert found(None, "｜DSML｜") == "deepseek_v32"
    assert found("{{ '<｜tool▁call▁begin｜>' + tool['type'] + '\\n```json\\n' }}") == "deepseek_v3"
    assert found("{{ '<｜tool▁call▁begin｜>' + tool['function']['name'] }}") == "deepseek_v31"
    assert found("<tool_call>{name}\n<arg_key>{k}</arg_key>\n<arg_value>") == "glm45"
    assert found("<tool_call>{name}<arg_key>{k}</arg_key><arg_value>") == "glm47"
    assert found("<|tool_call_begin|>") == "kimi_k2"
    assert found("{{ messages }}") is found(None) is None


HISTORY = [
    {"role": "user", "content": "天气？"},
    {
        "role": "assistant",
        "content": "查。",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "now", "arguments": '{"x": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": "晴"},
]


def test_history_is_written_the_way_the_template_wants():
    """``arguments`` 是文本还是 object 由模板定；模板不认得调用的，写进正文；不列出工具的，接在 system 后面。"""
    v31, glm = TOOL_FORMATS["deepseek_v31"], TOOL_FORMATS["glm45"]
    text = prepared(HISTORY, (), "tool_calls tools arguments'] + ''", v31)
    assert text == HISTORY
    for template in (
        "tool_calls tools function']['arguments']|tojson",
        "tool_calls tools tc.arguments.items()",
    ):
        made = prepared(HISTORY, (), template, v31)
        assert made[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert prepared(HISTORY, (), "tool_calls tools", glm)[1]["tool_calls"][0]["function"]["arguments"] == {
        "x": 1
    }
    either = (
        "tool_calls tools {% if x['arguments'] is string %}{% else %}{{ x['arguments'] | tojson }}{% endif %}"
    )
    assert prepared(HISTORY, (), either, glm) == HISTORY
    made = prepared(HISTORY, TOOLS, "messages", v31)
    assert [one["role"] for one in made] == ["system", "user", "assistant", "user"]
    assert "get_weather" in made[0]["content"]
    assert made[2]["content"] == "查。" + v31.encode([ToolCall("a", "now", '{"x": 1}')])
    assert "晴" in made[3]["content"]
    bad = [{**HISTORY[1], "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "["}}]}]
    with pytest.raises(DsxError, match="DSX-E764"):
        prepared(bad, (), "messages", v31)


def test_templates_list_the_tools_themselves():
    """模板得到 ``tools`` 与另给的变量；``tojson`` 的参数与 transformers 的相同，中文不转义。"""
    one = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    template = (
        "{% for t in tools or [] %}{{ t | tojson(ensure_ascii=False) }}{% endfor %}"
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v | tojson }}{% endfor %}{% endfor %}{% endfor %}"
        "{{ [1, 2] | tojson(separators=(',', ':')) }}{{ thinking }}"
    )
    tokenizer = BundleTokenizer(one, {}, template)
    style = find_tool_format(template, tokenizer.has_token)
    history = prepared(HISTORY, [PLAIN], template, style)
    text = tokenizer.apply_chat_template(
        history, True, [WEATHER.as_openai], {"thinking": "on", "messages": []}
    )
    assert text == json.dumps(WEATHER.as_openai, ensure_ascii=False) + "<x>1[1,2]on"


def test_v32_needs_no_template():
    """没有模板而有 DSML 的记号，就是 V3.2 的编码；两者都没有的照旧拒绝。"""
    one = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(DsxError, match="DSX-E502"):
        BundleTokenizer(one, {}, None).apply_chat_template(HISTORY)
    one.add_special_tokens(["｜DSML｜"])
    tokenizer = BundleTokenizer(one, {}, None)
    assert tokenizer.apply_chat_template(HISTORY, extra={"thinking": True}).endswith("<think>")
    assert tokenizer.apply_chat_template(HISTORY, tools=[PLAIN.as_openai]).endswith("</think>")


def test_special_tokens_stay_only_when_asked():
    """解码去掉特殊 token，指定的留着，流式的也是。"""
    one = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    one.add_special_tokens(["<x>", "<y>"])
    tokenizer = BundleTokenizer(one, {}, None)
    assert (tokenizer.decode([0, 2, 3, 1]), tokenizer.decode([0, 2, 3, 1], ["<y>"])) == ("a b", "a <y> b")
    stream = tokenizer.stream(["<y>"])
    assert "".join(stream.step(token) for token in [0, 2, 3, 1]) == "a <y> b"
