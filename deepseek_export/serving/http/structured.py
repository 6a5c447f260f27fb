"""约束输出的字段：``response_format`` 与 vLLM 的 ``structured_outputs``、``guided_*``，都变成一个 Lark 语法。"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from deepseek_export.errors import DsxError
from deepseek_export.extras import require_grammar
from deepseek_export.formats.grammar import regex_grammar
from deepseek_export.formats.lark import choice, schema_grammar
from deepseek_export.formats.limits import check_lark, check_regex, check_schema
from deepseek_export.serving.http.problems import ApiError

Schema = dict[str, Any] | StrictBool
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)]


class SchemaSpec(BaseModel):
    """``response_format.json_schema``；``strict`` 与否都照着生成。"""

    model_config = ConfigDict(populate_by_name=True)

    name: str | None = None
    description: str | None = None
    content: Schema = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    """``response_format``。"""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaSpec | None = None


class StructuredOutputs(BaseModel):
    """vLLM 的 ``structured_outputs``：恰好给一个。"""

    model_config = ConfigDict(populate_by_name=True, extra="forbid")

    content: str | Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: StrictBool | None = None


class Constraint(NamedTuple):
    """约束输出的语法，与它来自哪个字段；``inner`` 是其中叫作 ``@inner`` 的。"""

    lark: str
    field: str
    inner: str | None = None


class Structured(BaseModel):
    """两个生成的端点共有的。"""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    def constraint(self) -> Constraint | None:
        """要不要约束输出。

        Raises:
            ApiError: 400，给了不止一个，或写得不对。
            DsxError: ``DSX-E761``，没有装 llguidance。
        """
        given = [one for one in (*self._by_format(), *self._by_outputs(), *self._by_guided()) if one]
        if len(given) > 1:
            fields = "、".join(one.field for one in given)
            raise ApiError(400, f"{fields} 只能给一个", param=given[1].field, code="invalid_value")
        return given[0] if given else None

    def _by_format(self) -> list[Constraint | None]:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return []
        if wanted.type == "json_object":
            return [_schema({"type": "object"}, "response_format")]
        if wanted.json_schema is None:
            raise ApiError(
                400, "response_format.json_schema：没有这个字段", param="response_format.json_schema"
            )
        return [_schema(wanted.json_schema.content, "response_format.json_schema.schema")]

    def _by_outputs(self) -> list[Constraint | None]:
        one = self.structured_outputs
        if one is None:
            return []
        where = "structured_outputs."
        found = [
            _schema(one.content, where + "json"),
            _regex(one.regex, where + "regex"),
            _choice(one.choice, where + "choice"),
            _lark(one.grammar, where + "grammar"),
            _schema({"type": "object"}, where + "json_object") if one.json_object else None,
        ]
        if not any(found):
            raise ApiError(400, "structured_outputs 里什么也没有给", param="structured_outputs")
        return found

    def _by_guided(self) -> list[Constraint | None]:
        return [
            _schema(self.guided_json, "guided_json"),
            _regex(self.guided_regex, "guided_regex"),
            _choice(self.guided_choice, "guided_choice"),
            _lark(self.guided_grammar, "guided_grammar"),
        ]


def _schema(schema: str | Schema | None, field: str) -> Constraint | None:
    if schema is None:
        return None
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"{field} 不是 JSON：{error}", param=field, code="invalid_value") from error
    if not (schema is True or isinstance(schema, dict)):
        raise ApiError(400, f"{field} 要是一个 JSON Schema", param=field, code="invalid_value")
    return _checked(check_schema, schema, Constraint(schema_grammar(schema), field))


def _regex(regex: str | None, field: str) -> Constraint | None:
    if regex is None:
        return None
    require_grammar()
    return _checked(check_regex, regex, Constraint(regex_grammar(regex), field))


def _choice(texts: list[str] | None, field: str) -> Constraint | None:
    return None if texts is None else Constraint(choice(texts), field)


def _lark(grammar: str | None, field: str) -> Constraint | None:
    return None if grammar is None else _checked(check_lark, grammar, Constraint(grammar, field))


def _checked(check: Callable[[Any], None], given: Any, constraint: Constraint) -> Constraint:
    try:
        check(given)
    except DsxError as error:
        raise ApiError.of(error, constraint.field) from error
    return constraint
