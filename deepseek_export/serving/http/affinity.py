"""同样开头的请求去同一个副本：它的缓存里有那个前缀。

键是提示词开头的哈希，副本由键与副本的名字各打一个分、取最高的（rendezvous hashing）：不用谁记着，几个入口算出来都一样；多一个、少一个副本，只有归它的
那些键换地方。
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

#: 提示词开头的这么多字节相同，就算同样开头。
PREFIX_BYTES = 1024

_Candidate = TypeVar("_Candidate")


@dataclass(frozen=True)
class Hint:
    """一个请求该去哪里。

    Attributes:
        key: 见 :func:`affinity_key`；空的随便。
        tried: 试过而不行的副本。
        lost: 没有收下、也不知道是谁的，有几次。
    """

    key: str = ""
    tried: tuple[str, ...] = ()
    lost: int = 0


def choose(
    hint: Hint, replicas: Mapping[str, _Candidate], is_full: Callable[[_Candidate], bool]
) -> list[list[_Candidate]]:
    """依次的几组候选，前一组都不收才看后一组。

    1. 试过不行的不要，除非都试过了；
    2. 有过没有收下而不知道是谁的：照排的次序轮着来，转一圈就一定到得了还在的那个，随便挑的话可能次次挑中没有了的；
    3. 有键而它该去的那个没有满：就是它；
    4. 其余：随便取两个，由调用的人挑排队短的。

    Args:
        hint: 请求的。
        replicas: 名字 → 副本。
        is_full: 一个副本是不是满了。
    """
    fresh = {name: one for name, one in replicas.items() if name not in hint.tried} or replicas
    groups = []
    if hint.lost and fresh:
        groups.append([ranked(hint.key, fresh)[hint.lost % len(fresh)]])
    elif hint.key and fresh and not is_full(first := ranked(hint.key, fresh)[0]):
        groups.append([first])
    everyone = list(fresh.values())
    return [*groups, random.sample(everyone, min(2, len(everyone)))]


def affinity_key(body: bytes) -> str:
    """一个请求体的键；看不出提示词的是空串，随便哪个副本。

    对话取到用户的第一句为止：同一段对话后面的各轮开头相同，键就相同。
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(request, dict) or (prompt := _opening(request)) is None:
        return ""
    salt = f"{request.get('model')}\0{request.get('cache_salt')}\0"
    return hashlib.blake2b(salt.encode("utf-8", "replace") + prompt, digest_size=16).hexdigest()


def ranked(key: str, names: Mapping[str, _Candidate]) -> list[_Candidate]:
    """各个副本，最该去的在前。

    Args:
        key: :func:`affinity_key` 给的。
        names: 名字 → 副本。
    """

    def score(name: str) -> bytes:
        return hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=8).digest()

    return [names[name] for name in sorted(names, key=score, reverse=True)]


def _opening(request: Mapping[str, Any]) -> bytes | None:
    """提示词的开头，各个端点的都认。"""
    if (prompt := request.get("prompt")) is not None:
        first = prompt[0] if _is_batch(prompt) else prompt
        return _bytes(first)
    if isinstance(messages := request.get("messages"), list):
        return _bytes([request.get("system"), *_until_user(messages)])
    if (given := request.get("input")) is not None:
        opening = _until_user(given) if isinstance(given, list) else [given]
        return _bytes([request.get("instructions"), *opening])
    return None


def _is_batch(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def _until_user(messages: Sequence[Any]) -> list[Any]:
    """到用户的第一句为止。"""
    for number, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            return list(messages[: number + 1])
    return list(messages)


def _bytes(prompt: Any) -> bytes:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, sort_keys=True)
    return text.encode("utf-8", "replace")[:PREFIX_BYTES]
