"""kernels/：启动表、提前编译、缓存、程序的文本形式。全部不需要 GPU。"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError
from deepseek_export.kernels import compile as module
from deepseek_export.kernels.codes import E4M3, CodeFormat
from deepseek_export.kernels.compile import cache_key, compile_kernel, compile_table
from deepseek_export.kernels.grouped_swiglu_launch import grouped_swiglu_launch
from deepseek_export.kernels.index_topk_launch import SPLIT_QUERIES, index_topk_launch
from deepseek_export.kernels.latent_attention_launch import latent_attention_launch
from deepseek_export.kernels.latent_cache_update_launch import latent_cache_update_launch
from deepseek_export.kernels.program import SM_COUNT, Program
from deepseek_export.kernels.quantized_linear_launch import quantized_linear_launch
from deepseek_export.kernels.quantized_swiglu_launch import quantized_swiglu_launch
from deepseek_export.kernels.sparse_latent_attention_launch import sparse_latent_attention_launch
from deepseek_export.kernels.table import SMS
from deepseek_export.ops.table import (
    INDEX_TOPK,
    LATENT_ATTENTION,
    LATENT_CACHE_UPDATE,
    MOE_EXPERTS,
    QUANTIZED_LINEAR,
    QUANTIZED_MOE_EXPERTS,
    SPARSE_LATENT_ATTENTION,
)

pytestmark = pytest.mark.unit

#: DeepSeek-V3 的形状。
ATTENTION = {"num_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "scale": 0.1147}
EXPERTS = {"num_experts": 256, "top_k": 8, "hidden_size": 7168, "moe_intermediate_size": 2048}
FORMATS = (
    CodeFormat("int8", 32),
    CodeFormat("int4", 32),
    CodeFormat("int4", 128),
    CodeFormat(E4M3, 128, 128),
)
#: 输出宽的与输入宽的：K 切段的与不切的都有。
LINEARS = ((129280, 7168), (7168, 16384))
#: int8 缓存的写入。
UPDATE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
#: DeepSeek-V3.2 的索引器。
INDEX = {"num_heads": 64, "head_dim": 128, "topk": 2048}


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """空的缓存目录。"""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DSX_NO_CACHE", raising=False)


def tables(sm: int, dtype: str = "bfloat16"):
    attention = latent_attention_launch(sm, **ATTENTION, dtype=dtype)
    return (
        attention,
        grouped_swiglu_launch(sm, **EXPERTS, dtype=dtype),
        index_topk_launch(sm, **INDEX, dtype=dtype),
        sparse_latent_attention_launch(sm, **ATTENTION, topk=INDEX["topk"], dtype=dtype),
        latent_cache_update_launch(sm, **UPDATE, dtype=dtype),
        *(quantized_swiglu_launch(sm, **EXPERTS, dtype=dtype, form=form) for form in FORMATS),
        *(quantized_linear_launch(sm, *shape, dtype, form) for form in FORMATS for shape in LINEARS),
    )


def specs(table):
    return list(dict.fromkeys(launch.kernel for v in table.variants for launch in v.launches))


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """cuobjdump 报告的寄存器数与栈（溢出的寄存器在栈上）。"""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run(
        [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_compiles_for_each_sm(sm):
    """KERNEL-3：每种 SM 各编译一个注意力 kernel，共享内存在上限之内，机器码里没有源码路径。"""
    spec = specs(tables(sm)[0])[0]
    kernel = compile_kernel(spec, sm)
    assert kernel.cubin[:4] == b"\x7fELF"
    assert kernel.entry.encode() in kernel.cubin
    assert b"latent_attention.py" not in kernel.cubin
    assert 0 < kernel.shared <= SMS[sm].shared
    assert kernel.threads == spec.num_warps * 32


def most_stack(spec) -> float:
    """溢出的寄存器至多占几个字节；循环之内的溢出由 KERNEL-9 看。

    收集的注意力，每一行有自己的地址，一个线程搬几行就有几个。均分的注意力，一个程序依次做几段：走到了哪一行、那一行从哪里起，
    算的时候放在栈上，一段只存取一次；32 行的块的累加器已占满寄存器。64 行的溢出的是几个地址，换来的是 wgmma，不设上限。
    """
    rows = dict(spec.constants).get("BLOCK_M")
    if spec.function == "sparse_latent_attention_partial":
        return 256
    if spec.function == "latent_attention_partial" and rows in (32, 64):
        return 128 if rows == 32 else float("inf")
    return 16


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sm", SMS)
def test_compiles_everything(sm, dtype, tmp_path):
    """KERNEL-3：全部变体在全部 SM 上放得进共享内存；注意力之外的 kernel，寄存器至多溢出两对。"""
    for table in tables(sm, dtype):
        for spec in specs(table):
            kernel = compile_kernel(spec, sm)
            assert kernel.shared <= SMS[sm].shared
            stack = resources(kernel.cubin, tmp_path)["STACK"]
            assert stack <= most_stack(spec), (spec.function, spec.constants)
    wide = (
        latent_attention_launch(sm, **ATTENTION, dtype=dtype, cache_dtype="float32"),
        latent_attention_launch(sm, **ATTENTION, dtype=dtype, cache_dtype="int8"),
        index_topk_launch(sm, **INDEX, dtype=dtype, cache_dtype="float32"),
        sparse_latent_attention_launch(
            sm, **ATTENTION, topk=INDEX["topk"], dtype=dtype, cache_dtype="float32"
        ),
    )
    for spec in (spec for table in wide for spec in specs(table)):
        assert compile_kernel(spec, sm).shared <= SMS[sm].shared


def test_cached_by_content(empty_cache, monkeypatch):
    """KERNEL-4：第二次不再编译；常数、SM 或源码变了键就变。"""
    import triton

    table = tables(90)[1]
    spec = next(s for s in specs(table) if s.function == "combine")
    first = compile_kernel(spec, 90)
    monkeypatch.setattr(triton, "compile", None)
    assert compile_kernel(spec, 90) == first
    with pytest.raises(TypeError):  # 没有存过的，真的要编译
        compile_kernel(replace(spec, num_warps=8), 90)
    key = cache_key(spec, 90)
    assert cache_key(spec, 80) != key
    assert cache_key(replace(spec, num_warps=8), 90) != key
    assert cache_key(replace(spec, constants=(*spec.constants[:-1], ("BLOCK_D", 64))), 90) != key
    assert cache_key(replace(spec, module="latent_attention"), 90) != key


def test_the_cache_key_follows_what_is_inlined(monkeypatch):
    """KERNEL-4：内联进来的函数在另一个文件里，那个文件变了键也变，没有内联它的不变。"""
    _, swiglu, index, *_ = tables(90)
    (inlining, *_), (without, *_) = specs(index), specs(swiglu)
    keys = cache_key(inlining, 90), cache_key(without, 90)
    read = Path.read_text

    def edited(path: Path, **options: str) -> str:
        return read(path, **options) + "\n# 改过" * (path.name == "latent_attention.py")

    monkeypatch.setattr(Path, "read_text", edited)
    assert cache_key(inlining, 90) != keys[0]
    assert cache_key(without, 90) == keys[1]


def test_corrupt_cache_entry_is_rebuilt(empty_cache):
    """KERNEL-4：被改过的条目当作没有：重新编译，结果与原来相同，条目也修好了。"""
    spec = next(s for s in specs(tables(90)[1]) if s.function == "combine")
    want = compile_kernel(spec, 90)
    path = module.CACHE.directory / cache_key(spec, 90)
    good = path.read_bytes()
    path.write_bytes(good[:200] + b"x" + good[201:])
    assert compile_kernel(spec, 90) == want
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    "spec",
    [
        LATENT_ATTENTION,
        LATENT_CACHE_UPDATE,
        MOE_EXPERTS,
        QUANTIZED_MOE_EXPERTS,
        QUANTIZED_LINEAR,
        INDEX_TOPK,
        SPARSE_LATENT_ATTENTION,
    ],
    ids=lambda spec: spec.name,
)
def test_launch_tables_follow_the_op_table(spec):
    """启动表的输入输出是契约里的那些；kernel 的张量形参与端口同名，指的就是那个端口，类型也是它的。"""
    table = next(table for table in tables(90) if table.op == spec.name)
    for ports, tensors in ((spec.inputs, table.inputs), (spec.outputs, table.outputs)):
        assert [len(port.dims) for port in ports] == [len(tensor.dims) for tensor in tensors]
    used = set()
    for launch in (launch for variant in table.variants for launch in variant.launches):
        for (name, type_), argument in zip(launch.kernel.signature, launch.arguments, strict=True):
            if argument.kind in ("input", "output"):
                kind, index, _ = spec.find(name)
                assert argument == (kind, index)
                tensor = (table.inputs if kind == "input" else table.outputs)[index]
                assert type_ == DTYPES[tensor.dtype].triton
                used.add(name)
    # 就地改写的输入与输出是同一块，kernel 只要一个地址。
    shared = {given for _, given in spec.aliases}
    assert used == {port.name for port in (*spec.inputs, *spec.outputs)} - shared
    assert table.aliases == spec.aliased()
    with pytest.raises(KeyError):
        spec.find("no_such_port")


@pytest.fixture(scope="module")
def programs():
    """小形状的两个程序；与 test_plugins_tensorrt 用的相同，编译结果共用缓存。"""
    return (
        compile_table(latent_attention_launch(89, 8, 64, 16, 0.1, "float16")),
        compile_table(grouped_swiglu_launch(89, 8, 2, 32, 48, "float16")),
    )


def test_program_text_round_trip(programs):
    """KERNEL-5：程序 → 文本与 image → 程序，一字不差；同一个 kernel 的机器码只存一份。"""
    for program in (*programs, replace(programs[0], aliases=((0, 1),))):
        assert Program.from_text(program.to_text(), program.image) == program
    launches = [launch for v in programs[1].variants for launch in v.launches]
    assert (len(launches), len({launch.kernel for launch in launches})) == (8, 6)
    assert len(programs[1].image) == sum(len(k.cubin) for k in {launch.kernel for launch in launches})


def test_program_refuses_foreign_text(programs):
    """别的版本、截断的 image、不认识的行与参数。"""
    text, image = programs[0].to_text(), programs[0].image
    for changed, given_image, message in (
        (text.replace("dsx-program 2", "dsx-program 1"), image, "dsx-program 2"),
        (text, image[:-1], "image 只有"),
        (text, image + b"x", "程序只用到"),
        (text + "cluster 2\n", image, "不认识的行"),
        (text + "argument int64 1\n", image, "不认识的参数"),
    ):
        with pytest.raises(ValueError, match=message):
            Program.from_text(changed, given_image)


def test_bind(programs):
    """代入形状：选对变体，网格、workspace 的偏移与整数参数已求值；没有 token 时只剩必要的启动。"""
    weights = [(8, 48, 32), (8, 48, 32), (8, 32, 48)]
    program = programs[1]

    def shapes(n):
        return [(n, 32), (n, 2), (n, 2), *weights]

    few, small, large = (program.bind(shapes(n), 128) for n in (4, 33, 4096))
    assert [launch.kernel.entry for launch in few] == ["gate_up", "down", "combine"], "至多 64 对，不排序"
    assert [launch.kernel.entry for launch in small] == ["sort_pairs", "gate_up", "down", "combine"]
    assert small[1].kernel == few[0].kernel
    assert small[1].kernel != large[1].kernel
    assert small[0].grid == (8 + 1, 1, 1)
    assert few[0].grid == ((4 * 2 // 16 + 8) * 2, 1, 1)
    assert program.workspace(shapes(4)) < program.workspace(shapes(4096))
    assert program.bind(shapes(0), 128) == []
    with pytest.raises(ValueError, match="维 N 应为 4"):
        program.bind([(4, 32), (5, 2), (4, 2), *weights], 128)
    with pytest.raises(ValueError, match="个数或秩"):
        program.bind(shapes(4)[:-1], 128)


@given(st.data())
def test_workspace_is_monotonic_and_sufficient(data):
    """按最大尺寸要的 workspace 对任何更小的尺寸、任何变体、SM 有多有少的卡都够：TensorRT 只按最大尺寸问一次。"""
    table = data.draw(st.sampled_from(tables(data.draw(st.sampled_from(list(SMS))))))
    names = {name for tensor in table.inputs for name in tensor.dims if not name.isdigit()}
    large = {name: data.draw(st.integers(0, 300)) for name in sorted(names)}
    small = {name: data.draw(st.integers(0, size)) for name, size in large.items()}
    have = max(variant.workspace.evaluate(large) for variant in table.variants)
    small[SM_COUNT] = data.draw(st.integers(1, 400))
    for variant in table.variants:
        offsets = [
            argument.value.evaluate(small)
            for launch in variant.launches
            for argument in launch.arguments
            if argument.kind == "workspace"
        ]
        if not offsets:
            continue  # 没有切段的线性层
        # 最后一块是合看的记录（注意力，一个程序 8 字节）、lse（稀疏的，4 字节一行；只有一段时不用）、分数（索引器）、部分和（线性层）或各对的输出（专家）。
        grid = variant.launches[0].grid
        if table.op == "LatentAttention":
            tail = grid[0].evaluate(small) * 8
        elif table.op == "SparseLatentAttention":
            splits = grid[1].evaluate(small)
            tail = small["B"] * small["S"] * ATTENTION["num_heads"] * splits * 4 * (splits > 1)
        elif table.op == "IndexTopK":
            if not variant.when.evaluate(small):
                continue
            tail = grid[0].evaluate(small) * small["T"] * 4
        elif table.op == "QuantizedLinear":
            if not variant.when.evaluate(small):
                continue
            (N,) = (int(dim) for dim in table.outputs[0].dims if dim.isdigit())
            tail = grid[1].evaluate(small) * small["B"] * small["S"] * N * 4
        else:
            tail = small["N"] * EXPERTS["top_k"] * EXPERTS["hidden_size"] * 2
        assert max(offsets) + tail <= have


def test_programs_follow_the_card():
    """KERNEL-5：程序数是运行时那张卡的 SM 个数，不多于格子；SM 比表里多的卡按表里的，workspace 才够；workspace 不随 B、T 变大。"""
    table = tables(90)[0]

    def programs(B, S, T, sms=132):
        sizes = {"B": B, "S": S, "T": T, SM_COUNT: sms}
        variant = next(v for v in table.variants if v.when.evaluate(sizes))
        return variant.launches[0].grid[0].evaluate(sizes)

    assert programs(1, 1, 32768) == programs(128, 1, 32768) == 132
    assert programs(1, 1, 256) == 2 * 16, "128 个头是两块 64 行，一个程序至少 16 个 key"
    assert [programs(1, 1, 32768, sms) for sms in (114, 78, 1, 500)] == [114, 78, 1, 132], "H100 PCIe、H20"
    assert programs(1, 0, 1024) == 0, "没有新 token 就没有启动"
    large, larger = ({"B": B, "S": 8, "T": T} for B, T in ((16, 4096), (512, 131072)))
    assert [v.workspace.evaluate(large) for v in table.variants] == [
        v.workspace.evaluate(larger) for v in table.variants
    ]


def test_the_selection_needs_bounded_workspace():
    """DSA-10：分数的份数不超过 256 个 query，再长的 prefill 也不多要；注意力的各段与 query 的个数无关。"""
    index, attention = tables(90)[2:4]

    def bytes_of(B: int, S: int, T: int) -> tuple[int, int]:
        lens, row = (B,), (B, 1, T)
        index_shapes = [(B, S, 64, 128), (B, S, 64), (*row, 128), lens]
        return index.workspace(index_shapes), attention.workspace(
            [(B, S, 128, 576), (*row, 576), (B, S, 2048), (B, S)]
        )

    assert bytes_of(8, 4096, 131072) == bytes_of(8, 512, 131072)
    assert bytes_of(8, 512, 131072)[0] == SPLIT_QUERIES * 131072 * 4
    assert bytes_of(1, 1, 131072)[0] == 131072 * 4
    assert max(sm.most for sm in SMS.values()) <= SPLIT_QUERIES


def test_unknown_sm():
    """DSX-E901。"""
    with pytest.raises(DsxError, match="DSX-E901"):
        tables(75)


def test_without_triton(monkeypatch):
    """DSX-E902。"""
    spec = specs(tables(90)[0])[0]
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(DsxError, match="DSX-E902"):
        compile_kernel(spec, 90)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float32"}, {"cache_dtype": "int4"}, {"kv_lora_rank": 576}, {"qk_rope_head_dim": 128}],
)
def test_unsupported_problem(change):
    """DSX-E903。"""
    with pytest.raises(DsxError, match="DSX-E903"):
        latent_attention_launch(90, **{**ATTENTION, "dtype": "bfloat16", **change})


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"kv_lora_rank": 576}, {"qk_rope_head_dim": 128}])
def test_unsupported_update(change):
    """DSX-E903。"""
    with pytest.raises(DsxError, match="DSX-E903"):
        latent_cache_update_launch(90, **{**UPDATE, "dtype": "bfloat16", **change})


@pytest.mark.parametrize(
    "change", [{"dtype": "float32"}, {"cache_dtype": "int8"}, {"num_heads": 256}, {"head_dim": 192}]
)
def test_unsupported_indexer(change):
    """DSX-E903。"""
    with pytest.raises(DsxError, match="DSX-E903"):
        index_topk_launch(90, **{**INDEX, "dtype": "bfloat16", **change})


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"cache_dtype": "int8"}, {"kv_lora_rank": 576}])
def test_unsupported_sparse_attention(change):
    """DSX-E903。"""
    with pytest.raises(DsxError, match="DSX-E903"):
        sparse_latent_attention_launch(90, **{**ATTENTION, "topk": 2048, "dtype": "bfloat16", **change})


def test_too_much_shared_memory():
    """DSX-E904：H100 的块放不进 99 KiB。"""
    spec = specs(tables(90)[1])[1]
    with pytest.raises(DsxError, match="DSX-E904"):
        compile_kernel(replace(spec, num_stages=8), 89)
