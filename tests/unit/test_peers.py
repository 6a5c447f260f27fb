"""与同类的比较：写给 llama.cpp 的文件是同一个模型，常驻的子进程说得清死因，汇总不算错。测量本身不在测试里跑。"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import QUANT_TOLERANCES, TOLERANCES
from perf.isolate import Worker
from perf.peers.engines import LlamaCpp, Transformers
from perf.suites import peers
from perf.workload.workspace import SHAPES

pytestmark = pytest.mark.unit

PROMPT, TOTAL, CONTEXT = 24, 32, 256


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """缩小的场景的检查点（float32）、一串 token，与 transformers 的 logits。"""
    path = write_checkpoint(
        tmp_path_factory.mktemp("peers") / "checkpoint", SHAPES["peers-2"], dtype="float32"
    )
    tokens = np.random.default_rng(0).integers(0, SHAPES["peers-2"]["vocab_size"], TOTAL).tolist()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return path, tokens, model(torch.tensor([tokens])).logits[0].numpy()


def llama_logits(checkpoint, tokens, weights, exact=False) -> np.ndarray:
    """整段 prefill 之后逐个 token 解码，从提示词最后一个 token 起每行的 logits。"""
    pytest.importorskip("llama_cpp", reason="没有装 peers，见 docs/peers.md")
    from perf.peers.llama_file import write_gguf

    file = write_gguf(checkpoint, checkpoint.parent / f"{weights}.gguf", weights)
    engine = LlamaCpp(str(file), threads=1, context=CONTEXT, exact=exact)
    rows = [engine.logits(tokens[:PROMPT], 0).copy()]
    rows += [engine.logits([tokens[past]], past).copy() for past in range(PROMPT, TOTAL)]
    return np.stack(rows)


def test_gguf_is_the_same_model(small):
    """CPU-11：float32 的文件，prefill 与解码的 logits 在容差之内；测速时的设置只多出 float16 缓存的舍入。"""
    checkpoint, tokens, want = small
    for exact, tolerance in (
        (True, TOLERANCES["logits", "float32"]),
        (False, TOLERANCES["narrow_cache", "float16"]),
    ):
        found = measure(llama_logits(checkpoint, tokens, "F32", exact), want[PROMPT - 1 :])
        assert tolerance.accepts(found), found


@pytest.mark.parametrize(("weights", "row"), [("BF16", "int8"), ("Q8_0", "int8"), ("Q4_0", "int4")])
def test_gguf_only_rounds(small, weights, row):
    """CPU-11：权重舍入之后，与没有舍入的相差不超过 int8、int4 那一行。"""
    checkpoint, tokens, want = small
    found = measure(llama_logits(checkpoint, tokens, weights), want[PROMPT - 1 :])
    assert found.calc_diff <= QUANT_TOLERANCES["loss_all", "float32", row].calc_diff, found


def test_llama_cpp_fills_to_a_depth(small):
    """填出来的缓存恰好那么长、位置连续：已有的原样留着，在它之内解码，与直接 prefill 的一样；深处能接着走。"""
    pytest.importorskip("llama_cpp", reason="没有装 peers，见 docs/peers.md")
    from perf.peers.llama_file import write_gguf

    checkpoint, tokens, _ = small
    file = write_gguf(checkpoint, checkpoint.parent / "fill.gguf", "F32")
    engine = LlamaCpp(str(file), threads=1, context=1280)
    first = np.random.default_rng(0).integers(0, SHAPES["peers-2"]["vocab_size"], 512).tolist()
    want = engine.logits([*first[:100], tokens[0]], 0).copy()
    engine.go_to(1100)
    assert engine.decode(tokens[:3]) > 0
    memory = engine._llama.llama_get_memory(engine._context)
    assert engine._llama.llama_memory_seq_pos_min(memory, 0) == 0
    assert engine._llama.llama_memory_seq_pos_max(memory, 0) == 1102
    assert engine._llama.llama_memory_seq_pos_max(memory, 1) == -1
    found = measure(engine.logits([tokens[0]], 100), want)
    assert TOLERANCES["narrow_cache", "float16"].accepts(found), found


def test_gguf_refuses_what_it_does_not_write(tmp_path):
    """别的家族不猜。"""
    pytest.importorskip("gguf", reason="没有装 peers，见 docs/peers.md")
    from perf.peers.llama_file import write_gguf

    other = write_checkpoint(tmp_path / "v2", SHAPES["v2-lite-2"], sparse=True)
    with pytest.raises(ValueError, match=r"family.*q_lora_rank"):
        write_gguf(other, tmp_path / "v2.gguf", "F32")


def test_gguf_carries_the_indexer(tmp_path):
    """V3.2 是 llama.cpp 的 ``deepseek32``：索引器的形状在元数据里，每层五个张量，数就是检查点的，各头的权重与 norm 不量化。"""
    gguf = pytest.importorskip("gguf", reason="没有装 peers，见 docs/peers.md")
    from perf.peers.llama_file import write_gguf

    path = write_checkpoint(tmp_path / "x", SHAPES["v3.2-small-2"], dtype="bfloat16")
    reader = gguf.GGUFReader(write_gguf(path, tmp_path / "x.gguf", "Q8_0"))
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.architecture"] == "deepseek32"
    indexer = Checkpoint.open(path).config.indexer
    for key, want in (
        ("head_count", indexer.n_heads),
        ("key_length", indexer.head_dim),
        ("top_k", indexer.topk),
    ):
        assert facts[f"deepseek32.attention.indexer.{key}"] == want
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {
        "attn_q_b.weight": "Q8_0",
        "attn_k.weight": "Q8_0",
        "proj.weight": "F32",
        "k_norm.weight": "F32",
        "k_norm.bias": "F32",
    }
    names = {name for name in tensors if ".indexer." in name}
    assert names == {f"blk.{layer}.indexer.{name}" for layer in range(2) for name in kinds}
    for name, kind in kinds.items():
        assert tensors[f"blk.1.indexer.{name}"].tensor_type.name == kind, name
    heads = tensors["blk.0.indexer.proj.weight"].data
    want = Checkpoint.open(path).store.read("model.layers.0.self_attn.indexer.weights_proj.weight")
    np.testing.assert_array_equal(heads, want)


def test_transformers_engine_returns_to_its_depth(small):
    """解码之后缓存退回原来的长度；prefill 的 logits 就是模型的。"""
    checkpoint, tokens, want = small
    engine = Transformers(str(checkpoint), threads=torch.get_num_threads(), dtype="float32")
    found = measure(np.array(engine.last_logits(tokens)), want[-1])
    assert TOLERANCES["logits", "float32"].accepts(found), found
    for depth in (0, 40):
        engine.go_to(depth)
        assert engine.decode(tokens[:3]) > 0
        assert engine._cache.get_seq_length() == depth


def test_transformers_engine_fills_index_keys(tmp_path):
    """稀疏注意力的缓存还有索引 key：填到同样深，走完退回。"""
    path = write_checkpoint(tmp_path / "x", SHAPES["v3.2-small-2"], dtype="bfloat16")
    engine = Transformers(str(path), threads=torch.get_num_threads())
    engine.go_to(600)  # 越过名额
    assert engine.decode([1, 2]) > 0
    assert {layer.indexer_keys.shape[1] for layer in engine._cache.layers} == {600}
    assert engine._cache.get_seq_length() == 600


def test_worker_keeps_an_object_alive_and_reports_failures():
    worker = Worker("tests.isolated:Counter", {"DSX_TEST": "x"}, start=1)
    assert [worker.ask("add", value=2), worker.ask("add", value=3)] == [3, 6]
    assert worker.ask("environment", name="DSX_TEST") == "x"
    assert 0 < worker.memory().resident <= worker.memory().peak
    with pytest.raises(RuntimeError, match="ValueError: 不要负数"):
        worker.ask("add", value=-1)
    assert worker.ask("add", value=0) == 6  # 出错之后还能问
    with pytest.raises(RuntimeError, match="退出码 3"):
        worker.ask("die")
    worker.close()
    slow = Worker("tests.isolated:Counter", start=1)
    with pytest.raises(RuntimeError, match="hang 超过 0 秒"):
        slow.ask("hang", within=0.2)
    slow.close()
    with pytest.raises(RuntimeError, match="TypeError"):
        Worker("tests.isolated:Counter", wrong=1)


class Compiling:
    """像 torch.compile 那样的引擎：新填的与退回过的缓存各编译一次，深浅也各一次；``never`` 则每次都编译。"""

    def __init__(self, never: bool = False) -> None:
        self._seen: set[object] = set()
        self._never, self._depth, self._fresh = never, 0, True

    def ask(self, method: str, **arguments):
        if method == "compilations":
            return len(self._seen)
        if method == "go_to":
            self._depth, self._fresh = arguments["depth"], True
        elif method == "decode":
            self._seen.add(object() if self._never else (self._depth > 0, self._fresh))
            self._fresh = False
        else:
            self._seen.add(method)
        return 0.0


def test_nothing_compiles_while_samples_are_taken():
    """排练走过测量会遇到的每种布局；怎么走都还在编译的，原话说明。"""
    engine = Compiling()
    assert peers.rehearse(engine, peers.FULL, [0] * 4) is None
    before = engine.ask("compilations")
    assert before == 5
    for depth in peers.FULL.depths:
        engine.ask("go_to", depth=depth)
        for _ in range(3):
            engine.ask("decode", tokens=[0])
    assert engine.ask("compilations") == before
    assert "decode 走了 8 遍还在重新编译" in peers.rehearse(Compiling(never=True), peers.FULL, [0] * 4)


@pytest.mark.slow  # 真的 torch.compile，两三分钟
def test_torch_compile_settles_in_rehearsal(small):
    checkpoint, tokens, _ = small
    worker = Worker(
        "perf.peers.engines:Transformers",
        checkpoint=str(checkpoint),
        threads=1,
        dtype="float32",
        compiled=True,
    )
    scenario = peers.Scenario(depths=(0, 40), tokens=2)
    assert peers.rehearse(worker, scenario, tokens) is None
    before = worker.ask("compilations")
    assert before > 0
    for depth in scenario.depths:
        worker.ask("go_to", depth=depth)
        for _ in range(3):
            worker.ask("decode", tokens=tokens[:2])
    assert worker.ask("compilations") == before
    worker.close()


def test_a_case_reports_rates_and_time_ratios():
    """每秒 token 数越大越好，比值仍是时间之比，越小越好。"""
    samples = {peers.DSX: [0.01, 0.02], peers.DSX_COARSE: [0.005, 0.01], peers.LLAMA: [0.02, 0.04]}
    case = peers.case("depth 0", samples, {})
    assert case.values[f"{peers.DSX}.{peers.RATE}"].samples == (100, 50)
    assert {name: ratio.samples for name, ratio in case.ratios.items()} == {
        f"dsx/{peers.LLAMA}": (0.5, 0.5),
        f"dsx/{peers.DSX_COARSE}": (2, 2),
        f"dsx 块 128/{peers.LLAMA}": (0.25, 0.25),
    }


def test_without_the_extra_it_says_what_is_missing(monkeypatch):
    def absent(name: str) -> str:
        raise peers.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(peers.metadata, "version", absent)
    with pytest.raises(ImportError, match=r"llama-cpp-python.*docs/peers\.md"):
        peers.run(None, True, 1)
