"""specs/tensorrt 的 TRT-9：会话、CUDA graph、dsx verify --backend trt。在没有 GPU 的替身上证明，替了什么见 tests/fake_gpu.py。"""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import shutil
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import deepseek_export
from deepseek_export import DsxForCausalLM
from deepseek_export.backend.tensorrt.runner import TensorRTRunner
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.manifest import QuantizationEntry
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.engine import build
from deepseek_export.engine.flavour import FLAVOURS
from deepseek_export.engine.graph import KEY_SPAN
from deepseek_export.engine.record import EngineRecord
from deepseek_export.engine.shapes import ProfileShapes
from deepseek_export.kernels.compile import toolkit_version
from deepseek_export.parity.compare import compare_bundle
from deepseek_export.parity.tolerances import tolerance
from deepseek_export.parity.verify import verify_bundle
from deepseek_export.runtime import SamplingParams
from tests.contract.test_mtp_contract import SMALL
from tests.engines import refused
from tests.fake_gpu import FakeEngine, FakeGpu

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

PROMPTS = ([5, 9, 23, 100, 7], [44, 3, 2, *range(9, 27)])
_EXPORTS = {
    "mla+moe": {"profile": "mla+moe", "dtype": "float16"},
    "full": {"profile": "full", "dtype": "float16"},
    "absorb": {"profile": "full", "dtype": "float16", "overrides": ["mla.form=absorb"]},
    "bfloat16": {"profile": "full", "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        yield FakeGpu(patch)


@pytest.fixture(scope="module")
def bundles(gpu, tmp_path_factory) -> Callable[[str], Bundle]:
    """同一个检查点的几份 bundle，各建好引擎；bfloat16 的引擎由 float16 的那一份代跑。"""
    folder = tmp_path_factory.mktemp("session")
    checkpoint = write_checkpoint(folder / "ck", SMALL, dtype="float32", mtp=True)

    @functools.cache
    def make(name: str) -> Bundle:
        bundle = deepseek_export.export(checkpoint, folder / name, target="tensorrt-rtx", **_EXPORTS[name])
        gpu.build(bundle, run=gpu.build(make("full")) if name == "bfloat16" else None)
        return bundle

    return make


@pytest.fixture
def counts(gpu):
    gpu.driver.counts.clear()
    return gpu.driver.counts


def tokens(model, prompts, **options) -> list[list[int]]:
    return model.generate(prompts, max_new_tokens=24, **options).token_ids


@pytest.mark.parametrize("name", ["mla+moe", "full", "absorb"])
def test_tokens_equal_onnxruntime(bundles, counts, name):
    """TRT-9：贪心的 token 与 ONNX Runtime 的相同，投机与否、一条与一批；缓存原地更新，解码重放 CUDA graph。"""
    path = bundles(name).path
    here, there = deepseek_export.load(path), deepseek_export.load(path, backend="trt")
    for prompts in ([PROMPTS[0]], list(PROMPTS)):
        for speculative in (False, None) if there.speculative else (False,):
            assert tokens(there, prompts, speculative=speculative) == tokens(
                here, prompts, speculative=speculative
            )
    assert there.generate([PROMPTS[0]], max_new_tokens=4).notes == ()
    assert counts["launch"] > counts["plain"] > 0


def test_an_engine_that_copies_its_cache_is_refused(bundles, gpu, monkeypatch):
    """DSX-E922：编译器把整块缓存抄一遍，就不是原地更新：引擎不留下。"""
    bundle = bundles("mla+moe")
    cache = next(value for value in bundle.manifest.main.inputs if "T" in value.shape)
    line = f"Name: c, LayerType: copy, Inputs: [ {{ Name: x, Dimensions: [-1,1,128,{cache.shape[-1]}] }}]"
    monkeypatch.setattr(build, "build_engine_bytes", lambda *_: (memoryview(b"plan"), f"Layers:\n{line}"))
    path = bundle.path / "engines/rtx-sm89/engine.json"
    before = path.read_bytes()
    refused("DSX-E922", gpu.build, bundle)
    assert path.read_bytes() == before


def test_an_engine_is_written_from_its_buffer(bundles, gpu, monkeypatch, tmp_path):
    """TRT-10：写引擎、算哈希都用 TensorRT 交出的那块内存，不在进程里再复制一份。"""
    plan = np.zeros(64 << 20, np.uint8)
    monkeypatch.setattr(build, "build_engine_bytes", lambda *_: (memoryview(plan), ""))
    shutil.copytree(bundles("mla+moe").path, tmp_path / "copy")
    tracemalloc.start()
    try:
        shapes = ProfileShapes(prefill=(16, 32), capacity=64)
        made = build.build_engine(Bundle.open(tmp_path / "copy"), 89, FLAVOURS["rtx"], shapes)
        assert tracemalloc.get_traced_memory()[1] < plan.nbytes // 2
    finally:
        tracemalloc.stop()
    entry = made.record.plans["model.plan"]
    assert (entry.bytes, entry.sha256) == (plan.nbytes, hashlib.sha256(plan).hexdigest())
    assert (made.path / "model.plan").stat().st_size == plan.nbytes


def test_an_old_driver_is_told_so(bundles, gpu, monkeypatch):
    """DSX-E923：驱动的 CUDA 主版本比编译 kernel 的 ptxas 旧，加载之前就说；引擎记着是哪一版编译的。"""
    path = bundles("mla+moe").path
    toolkit = EngineRecord.read(path / "engines/rtx-sm89").toolkit
    assert toolkit == toolkit_version(89)
    monkeypatch.setattr(gpu.driver, "version", 11080)
    error = refused("DSX-E923", functools.partial(deepseek_export.load, path, backend="trt"))
    assert toolkit in error.what


def test_any_thread_can_use_and_drop_a_session(bundles, gpu):
    """TRT-9：在一个线程里加载，在别的线程里生成、放手：驱动的当前上下文按线程记，dsx 每次都设好。"""
    path = bundles("full").path
    gc.collect()
    before = len(gpu.driver.live), len(gpu.driver.graphs)
    held = [deepseek_export.load(path, backend="trt")]
    want = tokens(deepseek_export.load(path), list(PROMPTS))

    def use_and_drop():
        got = tokens(held[0], list(PROMPTS))
        held.clear()
        gc.collect()
        return got

    with ThreadPoolExecutor(1) as other:
        assert other.submit(use_and_drop).result() == want
    assert (len(gpu.driver.live), len(gpu.driver.graphs)) == before


def test_nothing_is_left_on_the_device(bundles, gpu):
    """TRT-9：会话与结果都放手之后，显存与 CUDA graph 全部归还。"""
    gc.collect()
    before = len(gpu.driver.live), len(gpu.driver.graphs)
    model = deepseek_export.load(bundles("full").path, backend="trt")
    tokens(model, list(PROMPTS))
    assert (len(gpu.driver.live), len(gpu.driver.graphs)) > before
    del model
    gc.collect()
    assert (len(gpu.driver.live), len(gpu.driver.graphs)) == before


def test_one_graph_per_call_and_context(bundles, counts):
    """TRT-9：同一次调用连着第二次才录，录的那次也照常执行；换了形状再换回来，录过的仍然有效；别的批次不误用它。"""
    session = deepseek_export.load(bundles("full").path, backend="trt").session
    one, two = session.new_caches(1), session.new_caches(1)

    def step(caches, size, times):
        for _ in range(times):
            ids, zero = np.full((1, size), 3), np.zeros(1, np.int64)
            session.run(ids, zero, np.zeros((1, 1), np.int64), caches)
        return counts["plain"], counts["capture"], counts["launch"]

    step(one, 12, 1), step(two, 12, 1)  # 缓冲区先长到最大，以后地址不变
    assert step(one, 1, 1) == (3, 0, 0)
    assert step(one, 1, 1) == (4, 1, 0)
    assert step(one, 1, 2) == (4, 1, 2)
    assert step(one, 2, 1) == (5, 1, 2)
    assert step(one, 1, 1) == (5, 1, 3)
    assert step(two, 1, 1) == (6, 1, 3)
    assert step(one, 1, 1) == (6, 1, 4)
    assert step(two, 1, 3) == (8, 2, 5)
    assert step(one, 12, 3) == (11, 2, 5)


def test_a_step_sends_what_changed(bundles, gpu, counts):
    """TRT-16：主机一侧都是锁页的内存；解码一步只送 token 与长度，没有变的不再送；结果放手之前那块内存还在。"""
    session = deepseek_export.load(bundles("full").path, backend="trt").session
    caches, sent = session.new_caches(1), []
    for past in range(4):
        before = counts["upload"]
        inputs = {
            "input_ids": np.full((1, 1), 3 + past),
            "past_lens": np.array([past]),
            "logits_positions": np.zeros((1, 1), np.int64),
            "draft_ids": np.zeros((1, 0), np.int64),
        }
        logits = session.runner.run(inputs, ("logits",), caches)["logits"]
        sent.append(counts["upload"] - before)
    assert sent == [3, 2, 2, 2], "没有草稿，空的不送"
    want, address = logits.copy(), logits.__array_interface__["data"][0]
    assert address in gpu.driver.pinned
    del session, caches
    gc.collect()
    assert address in gpu.driver.pinned
    assert np.array_equal(logits, want)
    del logits
    gc.collect()
    assert address not in gpu.driver.pinned


def step_inputs(size: int) -> tuple[np.ndarray, ...]:
    """两行各 ``size`` 个 token，每个位置都要。"""
    return np.full((2, size), 3), np.array([0, 5]), np.broadcast_to(np.arange(size), (2, size))


@pytest.mark.parametrize("name", ["mla+moe", "full"])
def test_a_greedy_step_fetches_a_few_numbers(bundles, counts, name):
    """TRT-16：贪心的一步，每个位置只取回 token（int64）与它的 logit（float32），选的与主机上由 logits 选的相同；要 logits 的照样给。"""
    session = deepseek_export.load(bundles(name).path, backend="trt").session
    caches, fetched = session.new_caches(2), []
    for want in (True, False):
        before = counts["fetched"]
        scores = session.scores(*step_inputs(2), caches, want)
        fetched.append(counts["fetched"] - before)
        assert (scores.logits is None) == (not want)
        if want:
            kept = scores.ids.copy(), scores.peaks.copy()
    assert fetched == [2 * 2 * session.vocab_size * 2, 2 * 2 * (8 + 4)]
    assert np.array_equal(scores.ids, kept[0])
    # 替身里的 ONNX Runtime 会略去中间那次舍入到 float16。
    assert np.array_equal(scores.peaks.astype(np.float16), kept[1])


def test_a_verified_step_fetches_no_logits(bundles, counts):
    """TRT-16：验证草稿的一步，接受几个、下一个是什么都在设备上定好，取回的只有它们与 hidden。"""
    session = deepseek_export.load(bundles("full").path, backend="trt").session
    caches, drafts = session.new_caches(2), np.full((2, 1), 7)
    got = session.verify(*step_inputs(2), drafts, caches, want_logits=False)
    assert got.scores.logits is None
    hidden = 2 * 2 * session.hidden_size * 2
    assert counts["fetched"] == 2 * (8 + 8) + hidden + 2 * 2 * (8 + 4)
    want = session.verify(*step_inputs(2), drafts, caches)
    assert want.scores.logits is not None
    assert np.array_equal(want.scores.ids, got.scores.ids)


def test_what_is_fetched_does_not_change_the_call(bundles, counts):
    """TRT-16：一步要 logits、一步不要，是同一次调用：录下的 CUDA graph 接着用。"""
    session = deepseek_export.load(bundles("mla+moe").path, backend="trt").session
    caches = session.new_caches(2)
    for want in (False, False, True, False, True):
        session.scores(*step_inputs(1), caches, want)
    assert (counts["plain"], counts["capture"], counts["launch"]) == (2, 1, 3)


@pytest.mark.parametrize("name", ["mla+moe", "full"])
def test_requests_that_take_the_largest_fetch_no_logits(bundles, gpu, monkeypatch, name):
    """TRT-16：服务引擎里，同批都只取最大的就不取 logits；有一个要抽样的、要对数概率的，那几步照取，别的请求 token 不变。"""
    path = bundles(name).path
    wanted: list[bool] = []
    run = TensorRTRunner.run

    def recorded(runner, inputs, outputs, caches):
        if "draft_id" not in runner.contract.outputs:
            wanted.append("logits" in outputs)
        return run(runner, inputs, outputs, caches)

    monkeypatch.setattr(TensorRTRunner, "run", recorded)
    want = deepseek_export.load(path).generate(list(PROMPTS), max_new_tokens=12, speculative=False).token_ids
    with deepseek_export.load(path, backend="trt").engine() as engine:
        greedy = [engine.submit(prompt, max_new_tokens=12) for prompt in PROMPTS]
        assert [request.result().token_ids for request in greedy] == want
        assert not any(wanted)
        wanted.clear()
        for other in (SamplingParams(temperature=1.0, seed=3), SamplingParams(logprobs=2)):
            both = [
                engine.submit(PROMPTS[0], max_new_tokens=12),
                engine.submit(PROMPTS[1], other, max_new_tokens=4),
            ]
            assert both[0].result().token_ids == want[0]
            assert len(both[1].result().token_ids) == 4
            assert any(wanted)
    assert len(both[1].result().logprobs or ()) == 4


def test_prefill_is_bounded_by_the_length(bundles, gpu, monkeypatch):
    """TRT-15：会话按这一次的长度给 ``key_span``：解码是 1，prefill 够长而不到容量；token 与 ONNX Runtime 的相同由 TRT-9 的测试管。"""
    seen = []
    execute = FakeEngine.execute

    def recorded(engine, shapes, addresses):
        seen.append((shapes["input_ids"][1], shapes[KEY_SPAN]))
        execute(engine, shapes, addresses)

    monkeypatch.setattr(FakeEngine, "execute", recorded)
    session = deepseek_export.load(bundles("full").path, backend="trt").session
    caches = session.new_caches(2)
    for size, past in ((12, [0, 0]), (1, [12, 12]), (20, [13, 60])):
        ids = np.full((2, size), 3)
        session.run(ids, np.array(past), np.zeros((2, 1), np.int64), caches)
    assert seen == [(12, (2, 64)), (1, (2, 1)), (20, (2, 128))]


def test_the_workspace_follows_the_length(bundles, gpu):
    """TRT-15：中间值的显存按这一次的形状要，不按配置的上限（整个容量）；不够才换大的，短的接着用；录过的 CUDA graph 不受影响。"""
    session = deepseek_export.load(bundles("full").path, backend="trt").session
    caches = session.new_caches(1)

    def blocks(size, past):
        before = set(gpu.driver.live)
        ids = np.full((1, size), 3)
        session.run(ids, np.array([past]), np.zeros((1, 1), np.int64), caches)
        return [len(gpu.driver.live[address]) for address in gpu.driver.live.keys() - before]

    a_row = FakeEngine.workspace({KEY_SPAN: (1, 1)})
    assert a_row * 64 in blocks(12, 0)
    for _ in range(3):
        blocks(1, 12)
    assert a_row * 64 not in blocks(12, 20)
    assert a_row * 128 in blocks(12, 90)
    assert not {a_row * 64, a_row * 128} & set(blocks(12, 0))
    blocks(1, 12)


@pytest.mark.parametrize(
    ("trouble", "value", "said"),
    [
        ("capturable", False, "不能录成"),
        ("allocates_while_capturing", True, "执行 decode"),
        ("out_of_memory", True, "的配置 decode"),
    ],
)
def test_failed_capture_is_said_once(bundles, gpu, counts, monkeypatch, trouble, value, said):
    """TRT-9：录不了时结果不变，原因写进结果的说明；流回到平常的状态，以后都照常执行。"""
    monkeypatch.setattr(gpu, trouble, value)
    path = bundles("full").path
    model = deepseek_export.load(path, backend="trt")
    want = tokens(deepseek_export.load(path), [PROMPTS[0]], speculative=False)
    result = model.generate([PROMPTS[0]], max_new_tokens=24, speculative=False)
    assert result.token_ids == want
    (note,) = result.notes
    assert "没有用 CUDA graph" in note
    assert said in note
    assert (counts["capture"], counts["launch"], gpu.driver.recording) == (0, 0, None)
    assert model.generate(list(PROMPTS), max_new_tokens=4, speculative=False).notes == (note,)


def test_transformers_front_end_runs_the_engine(bundles, gpu, monkeypatch):
    """TRT-9：``DsxForCausalLM`` 要的 logits 行数超过引擎的也分段；CUDA graph 用不了时发警告。"""
    path = bundles("full").path
    ids = torch.tensor([[*range(5, 30)]])
    monkeypatch.setattr(gpu, "capturable", False)
    model = DsxForCausalLM.from_pretrained(path, backend="trt")
    got, want = model(ids).logits, DsxForCausalLM.from_pretrained(path)(ids).logits
    scale = float(want.square().mean().sqrt())
    assert float((got - want).abs().max()) <= tolerance("logits", "float16").limit(scale)
    with pytest.warns(RuntimeWarning, match="没有用 CUDA graph"):
        model.generate(ids[:, :4], max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("name", ["full", "absorb", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_engine_is_verified(bundles, name):
    """TRT-9、TRT-11：引擎的整个模型与 PyTorch 比；一次要不了那么多行 logits 就分段，bfloat16 的只在这里能比。"""
    report = deepseek_export.verify(
        bundles(name).path, levels=("op", "model", "tokens"), backend="trt", steps=12
    )
    assert report.passed, report.first_failure
    levels = {case.level for case in report.cases}
    assert levels == ({"model", "tokens"} if name == "bfloat16" else {"activations", "op", "model", "tokens"})
    limit = 8 if name == "absorb" else 9
    assert any(f"一次至多给 {limit} 行" in note for note in report.notes)
    assert not any("CUDA graph" in note for note in report.notes)


def test_small_profiles_are_verified(bundles, gpu):
    """TRT-9：prefill 配置比校验的序列短也分段走完，批放不下就少比几条并说明。"""
    gpu.build(bundles("full"), "B=1:1:1,S=9:16,T=128")
    report = deepseek_export.verify(bundles("full").path, levels=("model",), backend="trt")
    gpu.build(bundles("full"))
    assert report.passed, report.first_failure
    assert any("只比前 1 条" in note for note in report.notes)


def test_where_bfloat16_can_be_checked(bundles):
    """TRT-11：引擎比得了 model、tokens 两级；要 ONNX Runtime 的级别与逐块比较各自拒绝，建议里没有行不通的。"""
    bundle = bundles("full")
    manifest = bundle.manifest
    cache = manifest.cache.model_copy(update={"dtype": "bfloat16"})
    changes = {"dtype": "bfloat16", "cache": cache}
    bundle = dataclasses.replace(bundle, manifest=manifest.model_copy(update=changes))
    report = verify_bundle(bundle, backend="trt", steps=8)
    assert report.passed, report.first_failure
    assert {case.level for case in report.cases} == {"model", "tokens"}
    for call in (
        lambda: verify_bundle(bundle),
        lambda: verify_bundle(bundle, levels=("block",), backend="trt"),
        lambda: compare_bundle(bundle),
    ):
        assert "--backend trt" in refused("DSX-E321", call).todo
    quantized = QuantizationEntry(kind="int8", block=32, keep=[], tensors=[])
    nothing = dataclasses.replace(
        bundle, manifest=bundle.manifest.model_copy(update={"quantization": quantized})
    )
    error = refused("DSX-E607", lambda: verify_bundle(nothing, levels=("tokens",), backend="trt"))
    assert "model" in error.todo
    error = refused("DSX-E614", lambda: compare_bundle(bundle, backends=["trt"]))
    assert "dsx verify --backend trt" in error.todo


def test_shapes_that_do_not_fit_say_what_to_do(bundles):
    """TRT-9：批太大要重建，一次的行太多要分几次（重建也放不宽）。"""
    session = deepseek_export.load(bundles("full").path, backend="trt").session
    run = lambda batch, size: session.run(  # noqa: E731
        np.zeros((batch, size), np.int64),
        np.zeros(batch, np.int64),
        np.broadcast_to(np.arange(size), (batch, size)),
        session.new_caches(batch),
    )
    assert "重建" in refused("DSX-E921", run, 9, 1).todo
    assert "分成几次" in refused("DSX-E921", run, 1, 20).todo
