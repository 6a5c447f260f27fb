"""specs/serving 里 ``/slots`` 的承诺；每个测试都开一个真的服务。"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import deepseek_export
from deepseek_export.cli.demo import CHECKPOINT
from tests.serving_http import Running, loader, until

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

PROMPT = "明月几时有，把酒问青天。不知天上宫阙，今夕是何年。"
ASKED = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """带草稿模型的。"""
    out = tmp_path_factory.mktemp("slots") / "out"
    return deepseek_export.export(CHECKPOINT, out, "full", target="ort-cpu").path


def cached(answer) -> int:
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_saved_restored_erased(bundle: Path, tmp_path: Path):
    """SERVE-14：字段同 llama.cpp；存下的前缀，重启的服务恢复之后不重算，回答相同；忘掉之后又要重算。"""
    with Running(loader(bundle, slots=2), slot_folder=tmp_path) as running:
        states = running.get("/slots").json()
        assert [state["id"] for state in states] == [0, 1]
        assert not any(state["is_processing"] for state in states)
        assert states[0]["speculative"] is True
        first = running.post("/v1/completions", ASKED)
        assert cached(first) == 0
        full = max(running.get("/slots").json(), key=lambda state: state["n_tokens"])
        assert full["n_ctx"] == running.engine.settings.context
        path = f"/slots/{full['id']}?action=save"
        saved = running.post(path, {"filename": "明月.slot"}).json()
        assert saved["timings"].pop("save_ms") >= 0
        assert saved == {
            "id_slot": full["id"],
            "filename": "明月.slot",
            "n_saved": full["n_tokens"],
            "n_written": (tmp_path / "明月.slot").stat().st_size,
            "timings": {},
        }
        lines = running.get("/metrics").text
        assert 'dsx:spec_decode_num_accepted_tokens_per_pos_total{model_name="demo",position="0"}' in lines
    with Running(loader(bundle, slots=2), slot_folder=tmp_path) as running:
        got = running.post("/slots/1?action=restore", {"filename": "明月.slot"}).json()
        assert got["timings"]["restore_ms"] >= 0
        assert (got["id_slot"], got["n_restored"]) == (1, saved["n_saved"])
        assert got["n_read"] == saved["n_written"]
        again = running.post("/v1/completions", ASKED)
        assert cached(again) > 0
        assert again.json()["choices"] == first.json()["choices"]
        for state in running.get("/slots").json():
            erased = running.post(f"/slots/{state['id']}?action=erase", None).json()
            assert erased == {"id_slot": state["id"], "n_erased": state["n_tokens"]}
        assert {state["n_tokens"] for state in running.get("/slots").json()} == {0}
        assert cached(running.post("/v1/completions", ASKED)) == 0


def test_refusals(bundle: Path, tmp_path: Path):
    """SERVE-14：名字不能是路径；坏的文件、没有的槽是 400，不说目录在哪里；没有给目录是 501。"""
    folder = tmp_path / "slots"
    folder.mkdir()
    (folder / "bad").write_bytes(b"not a slot")
    with Running(loader(bundle, slots=1), slot_folder=folder) as running:
        for name in (
            "",
            "..",
            "../a",
            "/etc/passwd",
            "a/b",
            "a\\b",
            "c:d",
            ".hidden",
            "a\n",
            "长" * 80,
            None,
        ):
            for action in ("save", "restore"):
                answer = running.post(f"/slots/0?action={action}", {"filename": name})
                assert answer.status_code == 400
                assert answer.json()["error"]["param"] == "filename"
        for action, slot, name in (("restore", 0, "bad"), ("restore", 0, "missing"), ("save", 7, "x")):
            answer = running.post(f"/slots/{slot}?action={action}", {"filename": name})
            assert answer.status_code == 400
            assert str(folder) not in answer.text
            assert answer.json()["error"]["code"] == ("DSX-E534" if slot else "DSX-E533")
        assert running.post("/slots/0?action=forget", None).status_code == 400
        assert running.post("/slots/0", None).status_code == 400
        assert running.get("/slots?model=other").status_code == 404
        assert running.get("/slots?fail_on_no_slot=1").status_code == 200
        assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["bad", "slots"]
    with Running(loader(bundle, slots=1)) as running:
        answer = running.post("/slots/0?action=save", {"filename": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (501, "not_supported")


def test_no_slot_is_free(bundle: Path, tmp_path: Path):
    """SERVE-14：``fail_on_no_slot``：都在用就是 503；正在用的槽不能忘掉。"""
    with Running(loader(bundle, slots=1)) as running:
        # 每一步都慢一点：问的时候它还在生成。
        slow = running.engine.submit([1], max_new_tokens=400, listener=lambda one: time.sleep(0.02))
        until(lambda: slow.token_ids)
        assert running.get("/slots?fail_on_no_slot=1").status_code == 503
        (state,) = running.get("/slots").json()
        assert state["is_processing"]
        assert running.post("/slots/0?action=erase", None).status_code == 400
        slow.cancel()
        running.idle()
        assert running.get("/slots?fail_on_no_slot=1").status_code == 200
