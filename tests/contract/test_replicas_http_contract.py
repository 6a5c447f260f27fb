"""specs/cluster 的 CLUSTER-52、CLUSTER-54：几个副本前面的入口，同样开头的去同一个副本。"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx
import pytest

from deepseek_export.serving.http import front
from deepseek_export.serving.http.affinity import Hint, affinity_key, choose, ranked
from deepseek_export.serving.http.front import Message, ReplicaLost, create_front
from deepseek_export.serving.http.keys import KeyRing
from deepseek_export.serving.http.metrics import merged

pytestmark = pytest.mark.contract


def key(**body: Any) -> str:
    return affinity_key(json.dumps(body, ensure_ascii=False).encode())


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_the_same_opening_has_the_same_key():
    """CLUSTER-54：一段对话的各轮、同样开头的长提示词，键相同；开头、模型、cache_salt 不同就不同。"""
    first = [turn("system", "你是助手"), turn("user", "床前明月光")]
    later = [*first, turn("assistant", "疑是地上霜"), turn("user", "举头望明月")]
    assert key(messages=first) == key(messages=later) != ""
    assert key(messages=first) != key(messages=[first[0], turn("user", "学而时习之")])
    assert key(messages=first) != key(messages=first, cache_salt="a")
    assert key(messages=first) != key(messages=first, model="b")
    assert key(system="s", messages=first) != key(messages=first)
    assert key(prompt="长" * 2000 + "甲") == key(prompt="长" * 2000 + "乙")
    assert key(prompt=["甲", "乙"]) == key(prompt="甲") != key(prompt="乙")
    assert key(prompt=[1, 2, 3]) == key(prompt=[[1, 2, 3], [4]])
    assert key(input="甲") == key(input="甲", stream=True) != key(input="甲", instructions="乙")
    assert key(input=later) == key(input=first)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"1", b"{}", b"[" * 100_000, b"\xff", b'{"messages": 1}', b'{"prompt": null}']
)
def test_what_has_no_prompt_goes_anywhere(body):
    """CLUSTER-54：看不出提示词的没有键。"""
    assert affinity_key(body) == ""
    assert key(prompt=[]) == key(prompt=[])
    assert key(messages=[1, {"role": 3}, turn("user", "x")]) != ""


def test_keys_spread_and_stay_when_replicas_change():
    """CLUSTER-54：键分散到各个副本；少一个副本，只有归它的换地方。"""
    names = {name: name for name in ("a", "b", "c", "d")}
    keys = [key(prompt=str(number)) for number in range(400)]
    before = {one: ranked(one, names)[0] for one in keys}
    counts = [list(before.values()).count(name) for name in names]
    assert min(counts) > 50
    fewer = {name: name for name in ("a", "b", "c")}
    moved = [one for one in keys if ranked(one, fewer)[0] != before[one]]
    assert {before[one] for one in moved} == {"d"}


def test_a_full_replica_is_passed_over():
    """CLUSTER-54：该去的那个满了、试过不行了，去别的；都试过了就不挑。"""
    names = {name: name for name in ("a", "b", "c")}
    hint = Hint(key(prompt="x"))
    best = ranked(hint.key, names)[0]
    assert choose(hint, names, lambda _: False)[0] == [best]
    (rest,) = choose(hint, names, lambda name: name == best)
    assert len(rest) == 2
    tried = Hint(hint.key, (best,))
    assert all(best not in group for group in choose(tried, names, lambda _: False))
    assert choose(Hint(hint.key, tuple(names)), names, lambda _: False)[0] == [best]
    turns = [choose(Hint(hint.key, lost=lost), names, lambda _: True)[0] for lost in (1, 2, 3)]
    assert turns == [[one] for one in (*ranked(hint.key, names)[1:], best)]
    (anyone,) = choose(Hint(), names, lambda _: False)
    assert len(anyone) == 2
    assert choose(Hint(), {"a": "a"}, lambda _: True) == [["a"]]


class Fleet:
    """假的副本们：照路由选一个，各照自己的脾气答。"""

    def __init__(self, **moods: str) -> None:
        self.moods = moods
        self.asked: list[str] = []
        self.closed: list[str] = []
        self.scopes: list[Mapping[str, Any]] = []
        self.full: set[str] = set()

    async def ask(self, hint: Hint, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        name = choose(hint, {one: one for one in self.moods}, lambda one: one in self.full)[0][0]
        mood = self.moods[name]
        self.asked.append(name)
        self.scopes.append(scope)
        try:
            if mood == "deaf":
                await asyncio.sleep(60)
            if mood == "gone":
                raise ReplicaLost
            yield {"type": "replica", "name": name}
            if mood == "dies":
                raise ReplicaLost
            yield {"type": "http.response.start", "status": 503 if mood == "busy" else 200, "headers": []}
            if scope["path"] == "/metrics":
                body = b"# HELP dsx:n_total n\n# TYPE dsx:n_total counter\n" + b'dsx:n_total{m="x"} 2.0\n'
            yield (
                {"type": "http.response.body", "body": name.encode() + b"|" + body, "more_body": True}
                if (scope["path"] != "/metrics")
                else {"type": "http.response.body", "body": body, "more_body": True}
            )
            if mood == "breaks":
                raise ReplicaLost
            if mood == "slow":
                await asyncio.sleep(60)
            yield {"type": "http.response.body", "body": b"", "more_body": False}
        finally:
            self.closed.append(name)


def sent(fleet: Fleet, method: str = "POST", path: str = "/v1/completions", **options: Any) -> httpx.Response:
    """经过入口问一次。"""
    app = create_front(fleet, options.pop("keys", None), options.pop("cors", ()))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


def test_the_answer_is_the_replicas_own():
    """CLUSTER-52：请求原样交给副本，回答原样递回来；同样开头的总是同一个。"""
    fleet = Fleet(a="well", b="well", c="well")
    said = {sent(fleet, json={"prompt": "x"}).text for _ in range(5)}
    assert len(said) == 1
    assert said.pop().partition("|")[2] == '{"prompt":"x"}'
    assert len({sent(fleet, json={"prompt": str(n)}).text[0] for n in range(40)}) == 3
    assert {scope["path"] for scope in fleet.scopes} == {"/v1/completions"}
    assert fleet.asked == fleet.closed


@pytest.mark.parametrize("mood", ["gone", "dies", "busy"])
def test_another_one_answers(mood):
    """CLUSTER-52：该去的那个没有了、还没有开始答就死了、答 503：换一个，客户端看不出来。"""
    fleet = Fleet(a="well", b="well")
    first = sent(fleet, json={"prompt": "x"}).text[0]
    fleet.moods[first] = mood
    for _ in range(10):
        answer = sent(fleet, json={"prompt": "x"})
        assert answer.status_code == 200
        assert answer.text[0] != first
    assert first in fleet.asked[1:]


def test_one_that_does_not_take_it(monkeypatch):
    """CLUSTER-52：停住了、不收的，限时换一个。"""
    monkeypatch.setattr(front, "ACCEPT_S", 0.1)
    fleet = Fleet(a="well", b="well")
    first = sent(fleet, json={"prompt": "x"}).text[0]
    fleet.moods[first] = "deaf"
    fleet.full.add(first)
    assert sent(fleet, json={"prompt": "x"}).status_code == 200


def test_when_all_are_busy_it_says_so_once():
    """CLUSTER-52：都答 503，就是 503，不一直换；都没有了，是可以再试的 503。"""
    fleet = Fleet(a="busy", b="busy", c="busy")
    answer = sent(fleet, json={"prompt": "x"})
    assert answer.status_code == 503
    assert sorted(set(fleet.asked)) == ["a", "b", "c"]
    assert len(fleet.asked) == 4
    gone = sent(Fleet(a="gone"), json={"prompt": "x"})
    assert gone.status_code == 503
    assert gone.headers["retry-after"] == "1"
    assert gone.json()["error"]["code"] == "no_replica"


def test_an_answer_that_breaks_is_not_made_up():
    """CLUSTER-52：答了一半副本没有了：断开，不接着编。"""
    with pytest.raises(ReplicaLost):
        sent(Fleet(a="breaks"), json={"prompt": "x"})


def test_a_client_that_leaves_ends_the_work():
    """CLUSTER-52：客户端先走了，副本那里就取消。"""
    fleet = Fleet(a="slow")
    app = create_front(fleet)

    async def run() -> None:
        said = asyncio.Event()
        inbox = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Any:
            if inbox:
                return inbox.pop()
            await said.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            said.set()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [],
        }
        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(run())
    assert fleet.closed == ["a"]


def test_keys_and_limits_are_at_the_front():
    """CLUSTER-52：没有密钥的到不了副本；槽不在这里；跨域照给的。"""
    fleet = Fleet(a="well")
    keys = KeyRing(["secret"])
    assert sent(fleet, json={"prompt": "x"}, keys=keys).status_code == 401
    assert fleet.asked == []
    allowed = {"Authorization": "Bearer secret"}
    assert sent(fleet, json={"prompt": "x"}, keys=keys, headers=allowed).status_code == 200
    assert sent(fleet, "GET", "/health", keys=keys).status_code == 200
    assert sent(fleet, "GET", "/slots").status_code == 404
    assert sent(fleet, "POST", "/slots/0?action=save").status_code == 404
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert sent(fleet, "OPTIONS", headers=ask, cors=("https://a.example",)).status_code == 200


def test_health_is_one_that_is_well():
    """CLUSTER-52：有一个好的就健康；都不好才是 503。"""
    assert sent(Fleet(a="busy", b="well", c="busy"), "GET", "/health").status_code == 200
    assert sent(Fleet(a="busy", b="busy"), "GET", "/health").status_code == 503


def test_metrics_are_of_all_replicas():
    """CLUSTER-52：``/metrics`` 是全部副本的，各有 ``replica`` 标签；不答的不算。"""
    text = sent(Fleet(a="well", b="well", c="busy"), "GET", "/metrics").text
    assert 'dsx:n_total{m="x",replica="a"} 2.0' in text
    assert 'dsx:n_total{m="x",replica="b"} 2.0' in text
    assert 'replica="c"' not in text
    assert text.count("# TYPE") == 1
    assert merged({}, "replica") == b""
