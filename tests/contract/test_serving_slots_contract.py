"""specs/serving 里槽的承诺：存到文件、恢复、拒绝坏的文件，从 Python 里与经过 HTTP。"""

from __future__ import annotations

import json
import os
import random
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import deepseek_export
from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.errors import DsxError
from deepseek_export.runtime import Generator, ModelSession, SpeculativeGenerator
from deepseek_export.serving import Engine, EngineSettings, scheduler
from deepseek_export.serving.accept import accepted
from tests.contract.test_mtp_contract import SMALL
from tests.engines import refused
from tests.fake_gpu import FakeGpu
from tests.unit.test_runtime_speculative_toy import LIMIT, build, draft_oracle, make_drafts
from tests.unit.test_runtime_toy import VOCAB, make_toy, save_toy

pytestmark = pytest.mark.contract

BASE = np.random.default_rng(5).integers(0, VOCAB, 200).tolist()


@pytest.fixture
def model(tmp_path) -> SpeculativeGenerator:
    toy = make_toy(LIMIT)
    folder = tmp_path / "toy"
    folder.mkdir()
    return build(folder, toy, make_drafts(toy, 2), 3)


def opened(model: SpeculativeGenerator, bundle: str | None = "sha", **settings) -> Engine:
    options = EngineSettings(**{"slots": 2, "rows": 3, "speculation_floor": False} | settings)
    return Engine(model.session, (), options, model.drafts, model.num_draft_tokens, bundle)


def resident(engine: Engine, tokens: int) -> int:
    """哪个槽里有这么多 token。"""
    return next(state.id for state in engine.slots() if state.tokens == tokens)


@pytest.mark.parametrize("speculation", [False, True])
def test_a_prefix_outlives_the_engine(model, tmp_path, monkeypatch, speculation):
    """SERVE-13：存下的前缀，另一个引擎恢复之后接着用，不重算，token 相同，草稿也与从头算的相同；``cache_salt`` 照存的时候。"""
    path, toy = tmp_path / "slot", make_toy(LIMIT)
    with opened(model, speculation=speculation) as engine:
        history = BASE[:60]
        history = [*history, *engine.submit(history, max_new_tokens=20, cache_salt="a").result().token_ids]
        (kept,) = [state for state in engine.slots() if state.tokens]
        assert not kept.busy
        assert engine.save_slot(kept.id, path) == (kept.tokens, path.stat().st_size)
        cold = engine.submit(history, max_new_tokens=20, cache_salt="b").result().token_ids
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["slot", "toy"]

    proposed: list[int] = []

    def checking(request, logits, best, peaks, drafts, row):
        if drafts:
            assert drafts == draft_oracle(toy, make_drafts(toy, 2), request.sequence.tolist(), len(drafts))
            proposed.append(len(drafts))
        return accepted(request, logits, best, peaks, drafts, row)

    monkeypatch.setattr(scheduler, "accepted", checking)
    with opened(model, speculation=speculation) as engine:
        assert engine.restore_slot(1, path) == (kept.tokens, path.stat().st_size)
        assert [state.tokens for state in engine.slots()] == [0, kept.tokens, 0]
        other = engine.submit(history, max_new_tokens=20, cache_salt="b").result()
        warm = engine.submit(history, max_new_tokens=20, cache_salt="a").result()
    assert other.cached_tokens == 0
    assert warm.cached_tokens == kept.tokens - (2 if speculation else 0)
    assert warm.token_ids == other.token_ids == cold
    assert bool(proposed) == speculation


def test_busy_slots_are_saved_as_they_are(model, tmp_path):
    """SERVE-13：正在生成的也能存，存到这一步为止，不打断它；不能恢复、不能忘掉；闲下来就能。"""
    codes: list[str] = []

    def listen(request) -> None:
        if len(request.token_ids) >= 10 and not codes:
            (slot,) = [state.id for state in engine.slots() if state.busy]
            engine.save_slot(slot, tmp_path / "slot")
            for act in (
                lambda: engine.restore_slot(slot, tmp_path / "slot"),
                lambda: engine.erase_slot(slot),
            ):
                codes.append(refused("DSX-E534", act).code)

    with opened(model) as engine:
        request = engine.submit(BASE[:30], max_new_tokens=20, listener=listen)
        want = Generator(model.session, None, ())
        tokens = request.result().token_ids
        assert len(codes) == 2
        (slot,) = [state.id for state in engine.slots() if state.tokens]
        count = next(state.tokens for state in engine.slots() if state.id == slot)
        assert engine.erase_slot(slot) == count
        assert [state.tokens for state in engine.slots()] == [0, 0, 0]
        assert engine.erase_slot(slot) == 0
        restored, _ = engine.restore_slot(slot, tmp_path / "slot")
        assert 30 < restored < 50
        again = engine.submit([*BASE[:30], *tokens], max_new_tokens=5).result()
    assert again.cached_tokens == restored - 2
    assert tokens == want.generate([BASE[:30]], 20).token_ids[0]


def test_numbers_follow_the_contents(model):
    """SERVE-13：内容随别人的加入、离开搬到别的行，编号不变。"""
    with opened(model, slots=3, rows=5) as engine:
        prompts = [BASE[at * 30 :][: 20 + at] for at in range(4)]
        for prompt in prompts:
            engine.submit(prompt, max_new_tokens=1).result()
        before = {state.tokens: state.id for state in engine.slots() if state.tokens}
        assert sorted(before) == [20, 21, 22, 23]
        # 三个同时生成，占着最前面的三行：原来在那里的让开，最久没有用到的两个没有了。
        for request in [engine.submit([at] * 3, max_new_tokens=9) for at in range(3)]:
            request.result()
        after = {state.tokens: state.id for state in engine.slots()}
        assert [after[length] for length in (22, 23)] == [before[length] for length in (22, 23)]


def edited(path: Path, change) -> Path:
    """改一个张量，别的照旧。"""
    arrays = dict(load_file(path))
    change(arrays)
    save_file(arrays, path)
    return path


def about(arrays, **changes) -> None:
    found = json.loads(arrays["about"].tobytes()) | changes
    arrays["about"] = np.frombuffer(json.dumps(found).encode(), np.uint8)


def test_bad_files_are_refused_whole(model, tmp_path):
    """SERVE-13：断了的、改过的、别的 bundle 的、别的格式的、太长的、没有草稿缓存的、不存在的，都按码拒绝；槽原样不动。"""
    path = tmp_path / "slot"
    with opened(model) as engine:
        engine.submit(BASE[:60], max_new_tokens=5).result()
        slot = next(state.id for state in engine.slots() if state.tokens)
        engine.save_slot(slot, path)
    good = path.read_bytes()

    def wrong(arrays) -> None:
        arrays["main.kv_cache.0"] = arrays["main.kv_cache.0"] ^ np.uint8(1)

    def other_tokens(arrays) -> None:
        arrays["tokens"] = arrays["tokens"] + 1

    def gone(arrays) -> None:
        del arrays["main.kv_cache.1"]

    def list_about(arrays) -> None:
        arrays["about"] = np.frombuffer(b"[1]", np.uint8)

    changes = {
        "校验和": [wrong, other_tokens, gone, lambda arrays: about(arrays, salt="b")],
        "格式": [lambda arrays: about(arrays, version=2)],
        "不是槽的文件": [list_about, lambda arrays: arrays.pop("about")],
    }
    with opened(model) as engine:
        for why, several in changes.items():
            for change in several:
                path.write_bytes(good)
                assert why in refused("DSX-E533", engine.restore_slot, 0, edited(path, change)).what
        for size in (0, 7, 100, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:size])
            assert "断了" in refused("DSX-E533", engine.restore_slot, 0, path).what
        path.write_bytes(b"x" * (64 << 20))
        assert "至多" in refused("DSX-E533", engine.restore_slot, 0, path).what
        for missing in (tmp_path / "no", tmp_path):
            refused("DSX-E533", engine.restore_slot, 0, missing)
        path.write_bytes(good)
        assert [state.tokens for state in engine.slots()] == [0, 0, 0]
        engine.restore_slot(0, path)
        refused("DSX-E405", engine.save_slot, 0, tmp_path / "no" / "slot")
    with opened(model, "other") as engine:
        assert "另一个 bundle" in refused("DSX-E533", engine.restore_slot, 0, path).what
    with opened(model, context=40) as engine:
        assert "至多 40" in refused("DSX-E533", engine.restore_slot, 0, path).what
    with opened(model, speculation=False) as engine:
        engine.restore_slot(0, path)  # 多出来的草稿缓存不要
        engine.save_slot(0, path)
    with opened(model) as engine:
        assert "没有投机" in refused("DSX-E533", engine.restore_slot, 0, path).what


def test_hostile_files_never_get_through(model, tmp_path):
    """SERVE-13：任意改几个字节、截断、接长，要么按码拒绝，要么内容一字不差；不会崩，也不会恢复出别的东西。"""
    path, chance, codes = tmp_path / "slot", random.Random(0), set[str]()
    with opened(model) as engine:
        engine.submit(BASE[:20], max_new_tokens=3).result()
        slot = next(state.id for state in engine.slots() if state.tokens)
        count, _ = engine.save_slot(slot, path)
        good = path.read_bytes()
        header = int.from_bytes(good[:8], "little") + 8
        for turn in range(400):
            content = bytearray(good)
            for _ in range(chance.choice((1, 1, 3))):
                where = chance.randrange(header if turn % 2 else len(content))
                content[where] = chance.randrange(256)
            if turn % 7 == 0:
                content = content[: chance.randrange(len(content))] + bytes(chance.randrange(3))
            path.write_bytes(content)
            try:
                assert engine.restore_slot(2, path)[0] == count
            except DsxError as error:
                codes.add(error.code)
                continue
            engine.save_slot(2, path)
            assert path.read_bytes() == good
        assert codes == {"DSX-E533"}
        assert engine.healthy


def test_slots_that_cannot_be_used_so(model, tmp_path):
    """SERVE-13：没有这个编号、空着、前缀复用关着、不知道是哪个 bundle、引擎停了，都按码拒绝。"""
    path = tmp_path / "slot"
    with opened(model) as engine:
        for slot in (3, -1, True, "0"):
            refused("DSX-E534", engine.save_slot, slot, path)
            refused("DSX-E534", engine.erase_slot, slot)
        assert "空着" in refused("DSX-E534", engine.save_slot, 0, path).what
        engine.submit(BASE[:60], max_new_tokens=5).result()
        engine.save_slot(next(state.id for state in engine.slots() if state.tokens), path)
    for act in (engine.slots, lambda: engine.erase_slot(0), lambda: engine.restore_slot(0, path)):
        refused("DSX-E531", act)
    with opened(model, prefix_reuse=False) as engine:
        assert "复用" in refused("DSX-E534", engine.restore_slot, 0, path).what
    with opened(model, None) as engine:
        assert "哪个 bundle" in refused("DSX-E534", engine.restore_slot, 0, path).what
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["slot", "toy"]


def test_full_disks_keep_the_old_file(model, tmp_path, monkeypatch):
    """SERVE-13：写不完就不留文件，原来有的还在。"""
    path = tmp_path / "slot"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with opened(model) as engine:
        engine.submit(BASE[:60], max_new_tokens=5).result()
        slot = next(state.id for state in engine.slots() if state.tokens)
        monkeypatch.setattr(os, "fsync", full)
        refused("DSX-E404", engine.save_slot, slot, path)
    assert path.read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["slot", "toy"]


@pytest.mark.heavy
def test_engine_backends_save_and_restore(tmp_path):
    """SERVE-13：TensorRT 的引擎也能（GPU 是替身）；ONNX Runtime 的文件不能给它，是另一个 bundle。"""
    checkpoint = write_checkpoint(tmp_path / "ck", SMALL, dtype="float32", mtp=True)
    out = tmp_path / "out"
    bundle = deepseek_export.export(checkpoint, out, "full", target="tensorrt-rtx", dtype="float16")
    prompt = [n % 160 for n in BASE[:40]]
    with pytest.MonkeyPatch.context() as patch:
        gpu = FakeGpu(patch)
        gpu.build(bundle)
        model = deepseek_export.load(bundle.path, backend="trt")
        with model.engine(EngineSettings(slots=2)) as engine:
            first = engine.submit(prompt, max_new_tokens=12, ignore_eos=True).result()
            saved, _ = engine.save_slot(
                resident(engine, max(s.tokens for s in engine.slots())), tmp_path / "s"
            )
        with model.engine(EngineSettings(slots=2)) as engine:
            assert engine.restore_slot(0, tmp_path / "s")[0] == saved
            again = engine.submit(prompt, max_new_tokens=12, ignore_eos=True).result()
        assert again.cached_tokens == 39
        assert again.token_ids == first.token_ids


def test_plain_models_save_and_restore(tmp_path):
    """SERVE-13：没有草稿模型的也能。"""
    path = save_toy(make_toy(LIMIT), tmp_path / "model.onnx", external=True)
    session = ModelSession(OrtRunner(path, threads=1, max_positions=LIMIT))
    with Engine(session, (), EngineSettings(slots=1), bundle="x") as engine:
        first = engine.submit(BASE[:50], max_new_tokens=9).result()
        assert engine.save_slot(0, tmp_path / "slot")[0] == 58
    with Engine(session, (), EngineSettings(slots=1), bundle="x") as engine:
        engine.restore_slot(0, tmp_path / "slot")
        again = engine.submit(BASE[:50], max_new_tokens=9).result()
    assert (again.token_ids, again.cached_tokens) == (first.token_ids, 49)
