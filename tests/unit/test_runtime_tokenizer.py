"""分词器：bos 只加一次、流式解码不拆字符、聊天模板与 transformers 逐字一致。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from deepseek_export.errors import DsxError
from deepseek_export.runtime import BundleTokenizer
from tests.odd_files import KINDS, hurried_templates, make_odd

pytestmark = pytest.mark.unit

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
MESSAGES = [
    {"role": "system", "content": "你是助手。"},
    {"role": "user", "content": "<b>你好</b> & 再见"},
    {"role": "assistant", "content": "好。"},
    {"role": "user", "content": "继续"},
]
# 结构仿照 DeepSeek-V3：namespace、tojson、控制空白、raise_exception、eos 收尾。
TEMPLATE = """{{ bos_token }}
{%- set ns = namespace(system='') %}
{% for m in messages %}
    {% if m.role == 'system' %}
        {% set ns.system = m.content %}
    {% endif %}
{% endfor %}
{{ ns.system }}
{% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
    {% if m.role == 'user' %}
User: {{ m.content }} {{ {'原文': m.content} | tojson }}
    {% elif m.role == 'assistant' %}
Assistant: {{ m.content }}{{ eos_token }}
    {% else %}
        {{ raise_exception('不认识的角色 ' + m.role) }}
    {% endif %}
{% endfor %}
{% if tools %}TOOLS{% endif %}
{% if add_generation_prompt %}Assistant:{% endif %}
"""


def byte_tokenizer() -> Tokenizer:
    """每个 UTF-8 字节一个 token 的 byte-level BPE：汉字一定跨三个 token。"""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    return tokenizer


def write(folder: Path, config: dict[str, Any] | None, bos_postprocessor: bool = False) -> BundleTokenizer:
    tokenizer = byte_tokenizer()
    if bos_postprocessor:
        pair = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[pair])
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        text = json.dumps(config, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    loaded = BundleTokenizer.load(folder)
    assert loaded is not None
    return loaded


def config(**extra: Any) -> dict[str, Any]:
    return {"bos_token": {"content": BOS, "__type": "AddedToken"}, "eos_token": EOS, **extra}


def test_no_tokenizer_json_is_none(tmp_path: Path) -> None:
    assert BundleTokenizer.load(tmp_path) is None


def test_token_fields_may_be_dicts(tmp_path: Path) -> None:
    loaded = write(tmp_path, config(unk_token=None))
    assert loaded.special_tokens == {"bos_token": BOS, "eos_token": EOS}
    assert loaded.bos_id == 256


@pytest.mark.parametrize("postprocessor", [False, True])
@pytest.mark.parametrize("text", ["你好", BOS + "你好", ""])
def test_bos_is_added_exactly_once(tmp_path: Path, postprocessor: bool, text: str) -> None:
    loaded = write(tmp_path, config(add_bos_token=True), postprocessor)
    ids = loaded.encode(text)
    assert ids[0] == loaded.bos_id
    assert ids.count(256) == 1
    assert loaded.decode(ids) == text.removeprefix(BOS)


@pytest.mark.parametrize("postprocessor", [False, True])
def test_bos_can_be_switched_off(tmp_path: Path, postprocessor: bool) -> None:
    loaded = write(tmp_path, config(add_bos_token=False), postprocessor)
    assert 256 not in loaded.encode("你好")


def test_without_config_tokenizer_json_decides(tmp_path: Path) -> None:
    loaded = write(tmp_path, None, bos_postprocessor=True)
    assert loaded.bos_id is None
    assert loaded.encode("a")[0] == 256


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_stream_equals_decode_and_never_splits_a_character(text: str) -> None:
    loaded = BundleTokenizer(byte_tokenizer(), {}, None)
    stream = loaded.stream()
    pieces = [stream.step(token) for token in loaded.encode(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_streams_are_independent_and_skip_special_tokens(tmp_path: Path) -> None:
    loaded = write(tmp_path, config(add_bos_token=True))
    first, second = loaded.stream(), loaded.stream()
    ids = loaded.encode("好")
    assert [first.step(i) for i in ids[:2]] == ["", ""]
    assert "".join(second.step(i) for i in [*ids, 257]) == "好"
    assert "".join(first.step(i) for i in ids[2:]) == "好"


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_chat_template_same_as_transformers(tmp_path: Path, add_generation_prompt: bool) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = write(tmp_path, config(chat_template=TEMPLATE))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token=BOS, eos_token=EOS, chat_template=TEMPLATE
    )
    want = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert loaded.apply_chat_template(MESSAGES, add_generation_prompt) == want
    assert "<b>你好</b> & 再见" in want


def test_templated_text_gets_no_second_bos(tmp_path: Path) -> None:
    loaded = write(tmp_path, config(chat_template=TEMPLATE, add_bos_token=True), bos_postprocessor=True)
    assert loaded.encode(loaded.apply_chat_template(MESSAGES)).count(256) == 1


def test_template_file_beats_config_and_named_list_uses_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "工具"}, {"name": "default", "template": "默认"}]
    assert write(tmp_path, config(chat_template=named)).apply_chat_template(MESSAGES) == "默认"
    (tmp_path / "chat_template.jinja").write_text("文件", encoding="utf-8")
    assert write(tmp_path, config(chat_template=named)).apply_chat_template(MESSAGES) == "文件"


def test_strftime_now(tmp_path: Path) -> None:
    rendered = write(tmp_path, config(chat_template="{{ strftime_now('%Y') }}")).apply_chat_template([])
    assert rendered.isdigit()


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(DsxError) as caught:
        write(tmp_path, config()).apply_chat_template(MESSAGES)
    assert caught.value.code == "DSX-E502"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TEMPLATE, "不认识的角色 tool"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 'a' + messages[0].missing }}", "missing"),
        ("{{ 'a' + 1 }}", "TypeError"),
    ],
)
def test_template_failures(tmp_path: Path, template: str, reason: str) -> None:
    loaded = write(tmp_path, config(chat_template=template))
    with pytest.raises(DsxError, match=reason) as caught:
        loaded.apply_chat_template([{"role": "tool", "content": ""}])
    assert caught.value.code == "DSX-E503"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path, config())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DsxError, match=name) as caught:
        BundleTokenizer.load(tmp_path)
    assert caught.value.code == "DSX-E501"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 9999999999 }}", "MemoryError"),
        ("{% set n = 9999999999 %}{{ 'x' * n }}", "MemoryError"),
        ("{{ 'x'.ljust(9999999999) }}", "MemoryError"),
        ("{{ '%9999999999s' % 'x' }}", "MemoryError|OverflowError"),
        ("{{ '{:9999999999}'.format('x') }}", "MemoryError|ValueError"),
        (
            "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "MemoryError",
        ),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "8,388,608 个字符"),
        ("{{ '%s' | format('x' * 9999999) }}", "8,388,608 个字符"),
        ("{{ '[' * 9999 }}{% " + "(" * 5000, "TemplateSyntaxError|RecursionError|MemoryError"),
    ],
)
def test_a_template_may_not_exhaust_memory(tmp_path: Path, template: str, reason: str) -> None:
    """RUNTIME-10：内存与结果的长度有上限，超出的按码拒绝；之后照样能渲染。"""
    loaded = write(tmp_path, config(chat_template=template))
    with pytest.raises(DsxError, match=reason) as caught:
        loaded.apply_chat_template(MESSAGES)
    assert caught.value.code == "DSX-E503"
    assert "你好" in write(tmp_path, config(chat_template=TEMPLATE)).apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = 10 ** (10 ** 9) %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_may_not_run_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """RUNTIME-10：CPU 时间有上限，停在一条 C 里的语句上也一样。"""
    hurried_templates(monkeypatch)
    loaded = write(tmp_path, config(chat_template=template))
    with pytest.raises(DsxError, match=r"超过 0\.5 秒") as caught:
        loaded.apply_chat_template(MESSAGES)
    assert caught.value.code == "DSX-E503"


def test_messages_that_are_not_json(tmp_path: Path) -> None:
    loaded = write(tmp_path, config(chat_template=TEMPLATE))
    with pytest.raises(DsxError, match="JSON") as caught:
        loaded.apply_chat_template([{"role": "user", "content": object()}])
    assert caught.value.code == "DSX-E503"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_small_regular_files(tmp_path: Path, name: str, kind: str) -> None:
    """RUNTIME-10：目录、管道、设备、断了的链接、大得离谱的都按码拒绝，不当作没有，也不读。"""
    write(tmp_path, config())
    make_odd(tmp_path / name, kind)
    with pytest.raises(DsxError, match=name) as caught:
        BundleTokenizer.load(tmp_path)
    assert caught.value.code == "DSX-E501"


def test_text_that_is_not_unicode(tmp_path: Path) -> None:
    """命令行上不是 UTF-8 的字节会变成落单的代理项。"""
    with pytest.raises(DsxError, match="Unicode") as caught:
        write(tmp_path, config()).encode("a\udcff")
    assert caught.value.code == "DSX-E702"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config(bos_token="\ud800")))
    with pytest.raises(DsxError, match="tokenizer_config") as caught:
        BundleTokenizer.load(tmp_path)
    assert caught.value.code == "DSX-E501"


def test_a_tokenizer_that_cannot_encode(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="没有")).save(str(tmp_path / "tokenizer.json"))
    loaded = BundleTokenizer.load(tmp_path)
    assert loaded is not None
    with pytest.raises(DsxError, match="UNK") as caught:
        loaded.encode("b")
    assert caught.value.code == "DSX-E501"
