"""与同类的比较：写给 llama.cpp 的文件是同一个模型，常驻的子进程说得清死因，缺了谁说得出，汇总不算错。测量本身不在测试里跑。

要编译好的 llama.cpp 的几条，没有 ``DSX_LLAMA_BUILD``（ik_llama.cpp 是 ``DSX_IK_LLAMA_BUILD``）就跳过，见 docs/peers.md。
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import QUANT_TOLERANCES, TOLERANCES
from perf.gates import load_gates
from perf.isolate import Answering, Worker
from perf.peers.engines import Dsx, Transformers
from perf.peers.field import RATE, Field, Pair, speeds
from perf.peers.llama_build import IK_BUILD, LLAMA_BUILD, LlamaBuild
from perf.suites import peers, peers_torch
from perf.workload.workspace import SHAPES

pytestmark = pytest.mark.unit

PROMPT, TOTAL, CONTEXT = 24, 32, 256
VARIABLES = {False: LLAMA_BUILD, True: IK_BUILD}


#: ik_llama.cpp 的路由不看组：只有一组的检查点上才是同一个模型，专家的个数、读算的量都一样。
ONE_GROUP = {"n_group": 1, "topk_group": 1}


def make_small(folder, **changes):
    """缩小的场景的检查点（float32）、一串 token，与 transformers 的 logits。"""
    path = write_checkpoint(folder / "checkpoint", SHAPES["peers-2"] | changes, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, SHAPES["peers-2"]["vocab_size"], TOTAL).tolist()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return path, tokens, model(torch.tensor([tokens])).logits[0].numpy()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_small(tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    """``drivers(ik)`` → 编译好的驱动；没有编译好的就跳过。"""
    made = {}

    def driver(ik: bool):
        if ik not in made:
            pytest.importorskip("gguf", reason="没有装 peers，见 docs/peers.md")
            try:
                build = LlamaBuild.find(VARIABLES[ik], ik=ik)
            except FileNotFoundError as error:
                pytest.skip(str(error))
            made[ik] = build.compile_driver(tmp_path_factory.mktemp("driver"))
        return made[ik]

    return driver


def open_llama(driver, checkpoint, weights, context, *flags) -> Answering:
    from perf.peers.llama_file import write_gguf

    file = checkpoint.parent / f"{weights}.gguf"
    return peers.llama(driver, write_gguf(checkpoint, file, weights), 1, context, *flags)


def llama_logits(driver, checkpoint, tokens, weights, *flags) -> np.ndarray:
    """整段 prefill 之后逐个 token 解码，从提示词最后一个 token 起每行的 logits。"""
    engine = open_llama(driver, checkpoint, weights, CONTEXT, *flags)
    rows = [engine.ask("logits", tokens=tokens[:PROMPT], past=0)]
    rows += [engine.ask("logits", tokens=[tokens[past]], past=past) for past in range(PROMPT, TOTAL)]
    engine.close()
    return np.array(rows)


def test_gguf_is_the_same_model(small, drivers):
    """CPU-11：float32 的文件，prefill 与解码的 logits 在容差之内；测速时的设置只多出 float16 缓存的舍入。"""
    checkpoint, tokens, want = small
    for flags, tolerance in (
        (("exact",), TOLERANCES["logits", "float32"]),
        ((), TOLERANCES["narrow_cache", "float16"]),
    ):
        found = measure(llama_logits(drivers(False), checkpoint, tokens, "F32", *flags), want[PROMPT - 1 :])
        assert tolerance.accepts(found), found


@pytest.mark.parametrize("ik", [False, True], ids=["llama.cpp", "ik_llama.cpp"])
@pytest.mark.parametrize(("weights", "row"), [("BF16", "int8"), ("Q8_0", "int8"), ("Q4_0", "int4")])
def test_gguf_only_rounds(small, drivers, tmp_path, weights, row, ik):
    """CPU-11：权重舍入之后，与没有舍入的相差不超过 int8、int4 那一行。"""
    driver = drivers(ik)
    checkpoint, tokens, want = make_small(tmp_path, **ONE_GROUP) if ik else small
    found = measure(llama_logits(driver, checkpoint, tokens, weights), want[PROMPT - 1 :])
    assert found.calc_diff <= QUANT_TOLERANCES["loss_all", "float32", row].calc_diff, found


@pytest.mark.parametrize("ik", [False, True], ids=["llama.cpp", "ik_llama.cpp"])
def test_llama_fills_to_a_depth(small, drivers, ik):
    """填出来的缓存恰好那么长、位置连续：已有的原样留着，在它之内解码，与直接 prefill 的一样；深处能接着走。"""
    checkpoint, tokens, _ = small
    engine = open_llama(drivers(ik), checkpoint, "F32", 1280)
    first = np.random.default_rng(0).integers(0, SHAPES["peers-2"]["vocab_size"], 512).tolist()
    want = np.array(engine.ask("logits", tokens=[*first[:100], tokens[0]], past=0))
    engine.ask("go_to", depth=1100)
    assert engine.ask("decode", tokens=tokens[:3]) > 0
    assert engine.ask("positions") == [0, 1102, 0 if ik else -1]  # 空的序列，两家说法不同
    found = measure(np.array(engine.ask("logits", tokens=[tokens[0]], past=100)), want)
    assert TOLERANCES["narrow_cache", "float16"].accepts(found), found
    engine.ask("open_rows", rows=2, context=64)
    assert engine.ask("decode_rows", tokens=tokens[:3]) > 0
    assert engine.ask("positions")[:2] == [0, 2]
    with pytest.raises(RuntimeError, match="没有 nonsense"):
        engine.ask("nonsense")
    engine.close()


def test_a_llama_build_is_checked_before_it_is_used(tmp_path, monkeypatch):
    """没有设、不是构建目录、是另一家的、还没有编译完，各说是哪一样；库按链接的次序找到。"""

    def refused(text: str, ik: bool = False) -> None:
        with pytest.raises(FileNotFoundError, match=text):
            LlamaBuild.find(LLAMA_BUILD, ik=ik)

    monkeypatch.delenv(LLAMA_BUILD, raising=False)
    refused(f"没有设 {LLAMA_BUILD}.*docs/peers")
    source, build = tmp_path / "source", tmp_path / "build"
    build.mkdir()
    monkeypatch.setenv(LLAMA_BUILD, str(build))
    refused("不是 llama.cpp 的 CMake 构建目录")
    header = source / "include/llama.h"
    header.parent.mkdir(parents=True)
    header.write_text("int mla_attn;")
    (build / "CMakeCache.txt").write_text(f"CMAKE_HOME_DIRECTORY:INTERNAL={source}\n")
    refused("是 ik_llama.cpp，这里要 llama.cpp")
    refused("还没有编译完", ik=True)
    header.write_text("")
    refused("是 llama.cpp，这里要 ik_llama.cpp", ik=True)
    (build / "src").mkdir()
    for name in ("libggml.a", "libllama.a"):
        (build / "src" / name).write_text("")
    found = LlamaBuild.find(LLAMA_BUILD, ik=False)
    assert [path.name for path in found.libraries()] == ["libllama.a", "libggml.a"]
    with pytest.raises(RuntimeError, match=r"llama_driver\.cpp 编译不过：.*error"):
        found.compile_driver(tmp_path)


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
    assert peers_torch.rehearse(engine, peers_torch.FULL, [0] * 4) is None
    before = engine.ask("compilations")
    assert before == 5
    for depth in peers_torch.FULL.depths:
        engine.ask("go_to", depth=depth)
        for _ in range(3):
            engine.ask("decode", tokens=[0])
    assert engine.ask("compilations") == before
    assert "decode 走了 8 遍还在重新编译" in peers_torch.rehearse(
        Compiling(never=True), peers_torch.FULL, [0] * 4
    )


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
    scenario = peers_torch.Scenario(depths=(0, 40), tokens=2)
    assert peers_torch.rehearse(worker, scenario, tokens) is None
    before = worker.ask("compilations")
    assert before > 0
    for depth in scenario.depths:
        worker.ask("go_to", depth=depth)
        for _ in range(3):
            worker.ask("decode", tokens=tokens[:2])
    assert worker.ask("compilations") == before
    worker.close()


class Broken:
    """走到一半中止的同类。"""

    def prefill(self, tokens: list[int]) -> float:
        raise RuntimeError("GGML_ASSERT 不成立")


def test_a_peer_that_breaks_leaves_the_field_and_says_why():
    """打不开的、走不下去的同类退场，原话留着，别的照测；dsx 自己的就是错。"""
    with ExitStack() as stack:
        field = Field()
        openers = {
            "peer": lambda: Worker("tests.unit.test_peers:Broken"),
            "gone": lambda: Worker("tests.unit.test_peers:Broken", wrong=1),
            "slow peer": lambda: Worker("tests.isolated:Counter", start=1),
        }
        field.open(openers, stack)
        assert field.samples(["peer", "gone"], 2, "prefill", tokens=[1]) == {}
        assert set(field.engines) == {"slow peer"}
        assert "GGML_ASSERT 不成立" in field.failed["peer"]
        assert "TypeError" in field.failed["gone"]
        beside = {"beside": lambda: 2.0}
        assert field.samples(["slow peer"], 3, "add", beside, value=0)["beside"] == [2.0] * 3
        memory = field.memory(
            field.engines, [Pair("x", "slow peer", "slow peer"), Pair("y", "slow peer", "peer")]
        )
        assert memory.ratios["内存 x/slow peer"].median == 1
        assert set(memory.ratios) == {"内存 x/slow peer"}
        field.engines["dsx"] = field.engines["slow peer"]
        with pytest.raises(RuntimeError, match="不要负数"):
            field.each(["dsx"], "add", value=-1)


def test_a_case_reports_rates_and_time_ratios():
    """每秒 token 数越大越好，比值仍是时间之比，越小越好；不在场的不比。"""
    samples = {peers.DSX: [0.01, 0.02], peers.DSX_COARSE: [0.005, 0.01], peers.LLAMA: [0.02, 0.04]}
    case = speeds("depth 0", samples, peers.PAIRS, depth=0)
    assert case.values[f"{peers.DSX}.{RATE}"].samples == (100, 50)
    assert {name: ratio.samples for name, ratio in case.ratios.items()} == {
        f"dsx/{peers.LLAMA}": (0.5, 0.5),
        f"dsx 块 128/{peers.LLAMA}": (0.25, 0.25),
    }


def test_optional_gates_name_ratios_that_the_suite_makes():
    """没有量就不看的门槛，名字写错了也不会有人发现：每个比值都由要比的一对、或读速得来。"""
    made = {f"{pair.name}/{pair.peer}" for pair in peers.PAIRS}
    made |= {f"内存 {name}" for name in made}
    made |= {f"{name}/{peers.READ}" for name in (peers.DSX, peers.DSX_COARSE, peers.DSX_INT4)}
    cases = {"prefill", "prefill 256", "prefill 2048", "depth 0", "depth 8192", "batch", "内存"}
    found = [gate for gate in load_gates().gates if gate.suite == "peers"]
    assert {gate.id for gate in found if gate.optional} == {f"CPU-{number}" for number in range(31, 36)}
    assert {gate.ratio for gate in found} <= made
    assert {gate.case for gate in found} <= cases


def test_dsx_engine_decodes_rows(tmp_path, exported):
    """几行一起解码，每行都走；一步读的字节随深度长。"""
    bundle = exported("v3-yarn", "mla+moe")
    engine = Dsx(str(bundle.path), threads=1, context=40)
    engine.go_to(30)
    assert engine.decode([1, 2, 3]) > 0
    engine.open_rows(3, 16)
    assert engine.decode_rows([1, 2]) > 0
    assert engine.step_bytes(9) - engine.step_bytes(8) == bundle.manifest.cache.bytes_per_token


def test_amx_is_said_where_the_machine_has_it():
    """CPU-31：有 AMX 的机器上，谁用它写在结果里；没有就不写。"""
    build = {peers.LLAMA: "AVX512 = 1 | AMX_INT8 = 1 |", peers.IK: "AVX512 = 1", peers.VLLM: "vLLM 1"}
    assert peers.amx(build, {"avx512f"}) == ""
    said = peers.amx(build, {"avx512f", "amx_int8"})
    assert peers.LLAMA in said
    assert peers.VLLM in said
    assert peers.IK not in said


def test_without_the_extra_it_says_what_is_missing(monkeypatch):
    """没有装 gguf、没有编译 llama.cpp、没有 vLLM，各说缺什么。"""
    monkeypatch.delenv(LLAMA_BUILD, raising=False)
    monkeypatch.setenv(peers.VLLM_PYTHON, "/nonexistent/python")
    with pytest.raises(FileNotFoundError, match=peers.VLLM_PYTHON):
        peers.vllm_python()
    monkeypatch.setenv(peers.VLLM_PYTHON, sys.executable)
    assert peers.vllm_python() == sys.executable

    def absent(name: str) -> str:
        raise peers.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(peers.metadata, "version", absent)
    for suite in (peers, peers_torch):
        with pytest.raises(ImportError, match=r"gguf.*docs/peers\.md"):
            suite.run(None, True, 1)
