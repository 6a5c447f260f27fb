"""写 llguidance 的 Lark 语法：字符串、正则、特殊 token、JSON Schema 与裸的文本。"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from deepseek_export.formats.calls import Spell

#: JSON 里的空白：几个空格，或换一行再缩进。不限的话，小模型会一直写空白，写到用完为止。
_SPACES = r"(\x0D?\x0A[\x20\x09]{0,24}|[\x20\x09]{1,4})"
#: 任何文本；点号不含换行。
ANY_TEXT = r"(.|\n)*"
#: 会引用别处的键：子 schema 单独拿出来时要带上。
_DEFINITIONS = ("$defs", "definitions")


def quoted(text: str) -> str:
    """Lark 的字符串。"""
    return json.dumps(text, ensure_ascii=False)


def escaped(text: str) -> str:
    """正则里的原文。"""
    out = "".join("\\" + char if char in r"\.^$|?*+()[]{}/" else char for char in text)
    return out.replace("\n", r"\n").replace("\t", r"\t").replace("\r", r"\r")


def speller(special: Mapping[str, int]) -> Spell:
    """特殊 token 写成 ``<[id]>``：llguidance 里它们与同样的文本不是一回事。

    Args:
        special: 特殊 token 的文本 → id。
    """
    known = sorted(special, key=len, reverse=True)

    def spell(text: str) -> str:
        parts = []
        while text:
            at, token = min(((text.find(one), one) for one in known if one in text), default=(len(text), ""))
            if at:
                parts.append(quoted(text[:at]))
            if token:
                parts.append(f"<[{special[token]}]>")
            text = text[at + len(token) :]
        return " ".join(parts)

    return spell


def json_schema(schema: Any) -> Any:
    """交给 llguidance 的 schema，空白有限；不成样子的原样给它，由它拒绝。"""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        return schema
    return {**schema, "x-guidance": {"whitespace_pattern": _SPACES}}


def json_rule(name: str, schema: Any) -> str:
    """规则 ``name``：合乎 ``schema`` 的 JSON。"""
    return f"{name}: %json {json.dumps(json_schema(schema))}"


def arguments_rule(name: str, schema: Mapping[str, Any]) -> str:
    """规则 ``name``：一次调用的参数；没有说可以多给的，不多给。"""
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return json_rule(name, {**closed, **schema})


def until(name: str, body: str, end: str, spell: Spell) -> str:
    """规则 ``name``：合乎正则 ``body`` 的文本，直到头一个 ``end``（也吃掉）；``end`` 里的特殊 token 文本里不会有。"""
    marker = spell(end)
    plain, _, special = marker.partition("<[")
    if not special:
        return f"{name}[lazy]: /{body}{escaped(end)}/"
    # 词法是贪心的：把特殊 token 之前的那几个字写进同一个记号，它才切得开。
    before = json.loads(plain) if plain.strip() else ""
    return f"{name}: {name.upper()} <[{special}\n{name.upper()}: /{body}{escaped(before)}/"


def text_kind(schema: Any, root: Mapping[str, Any], seen: frozenset[str] = frozenset()) -> tuple[bool, bool]:
    """``(可以是字符串, 可以是别的)``；看不出来（包括指回自己的）就都可以。"""
    if not isinstance(schema, Mapping):
        return True, True
    reference = schema.get("$ref")
    if isinstance(reference, str):
        found: Any = root if reference.startswith("#/") and reference not in seen else None
        for part in reference[2:].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return text_kind(found, root, seen | {reference})
    if (values := _values(schema)) is not None:
        return _either((isinstance(value, str), not isinstance(value, str)) for value in values)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return _either(text_kind(one, root, seen) for one in schema[key])
    kinds = schema.get("type")
    if kinds is None:
        return True, True
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return "string" in kinds, any(kind != "string" for kind in kinds)


def text_pattern(schema: Any) -> str:
    """裸的字符串合乎的正则：``enum``、``const``、长度与 ``pattern``；别的不管。"""
    if not isinstance(schema, Mapping):
        return ANY_TEXT
    if (values := _values(schema)) is not None:
        return "(" + "|".join(escaped(value) for value in values if isinstance(value, str)) + ")"
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        start = "" if pattern.startswith("^") else ANY_TEXT
        end = "" if pattern.endswith("$") else ANY_TEXT
        body = pattern.removeprefix("^").removesuffix("$").replace("/", r"\/").replace("\n", r"\n")
        return f"{start}({body}){end}"
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    return r"(.|\n){" + f"{low},{'' if high is None else high}" + "}" if low or high is not None else ANY_TEXT


def within(schema: Any, root: Mapping[str, Any]) -> Any:
    """子 schema 单独拿出来，``$ref`` 仍指得到。"""
    if not isinstance(schema, Mapping):
        return schema
    return {**{key: root[key] for key in _DEFINITIONS if key in root}, **schema}


def choice(texts: Iterable[str]) -> str:
    """整个语法：几段文本里的一段。"""
    return "start: " + " | ".join(quoted(text) for text in texts)


def schema_grammar(schema: Any) -> str:
    """整个语法：合乎 ``schema`` 的 JSON。"""
    return json_rule("start", schema)


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """只能取这几个；没有说是 ``None``。"""
    given = schema.get("enum")
    if isinstance(given, list):
        return given
    return [schema["const"]] if "const" in schema else None


def _either(pairs: Iterable[tuple[bool, bool]]) -> tuple[bool, bool]:
    text, other = False, False
    for one, another in pairs:
        text, other = text or one, other or another
    return text, other
