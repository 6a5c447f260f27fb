"""kernels/：启动表、提前编译、磁盘缓存、程序的文本形式。全部不需要 GPU。"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_export.errors import DsxError
from deepseek_export.kernels import compile as module
from deepseek_export.kernels.compile import cache_key, compile_kernel, compile_plan, default_cache
from deepseek_export.kernels.program import Program
from deepseek_export.kernels.table import SMS, grouped_swiglu_plan, latent_attention_plan

pytestmark = pytest.mark.unit

#: V3 的注意力（H=128）与 V2-Lite 的（H=16）；专家用 V3 的形状。
ATTENTION = {"num_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "scale": 0.1147}
EXPERTS = {"num_experts": 256, "top_k": 8, "hidden_size": 7168, "moe_intermediate_size": 2048}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """本模块共用的缓存目录。"""
    return tmp_path_factory.mktemp("kernels")


def plans(sm: int, dtype: str = "bfloat16"):
    return latent_attention_plan(sm, **ATTENTION, dtype=dtype), grouped_swiglu_plan(
        sm, **EXPERTS, dtype=dtype
    )


def specs(plan):
    return list(dict.fromkeys(launch.kernel for v in plan.variants for launch in v.launches))


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
def test_compiles_for_each_sm(sm, cache):
    """每种 SM 各编译一个注意力 kernel：机器码是这种 SM 的，共享内存在上限之内。"""
    spec = specs(plans(sm)[0])[0]
    kernel = compile_kernel(spec, sm, cache)
    assert kernel.cubin[:4] == b"\x7fELF"
    assert kernel.entry.encode() in kernel.cubin
    assert 0 < kernel.shared <= SMS[sm].shared
    assert kernel.threads == spec.num_warps * 32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sm", SMS)
def test_compiles_everything(sm, dtype, cache, tmp_path):
    """全部变体在全部 SM 上放得进共享内存，不用 scratch，寄存器不溢出。"""
    for plan in plans(sm, dtype):
        for spec in specs(plan):
            kernel = compile_kernel(spec, sm, cache)
            assert kernel.shared <= SMS[sm].shared
            assert resources(kernel.cubin, tmp_path)["STACK"] == 0, (spec.function, spec.constants)


def test_cached_by_content(cache, monkeypatch):
    """第二次不再编译；常数、SM 或源码变了键就变。"""
    plan = plans(90)[1]
    spec = next(s for s in specs(plan) if s.function == "combine")
    first = compile_kernel(spec, 90, cache)
    monkeypatch.setattr(module, "_compile", None)
    assert compile_kernel(spec, 90, cache) == first
    key = cache_key(spec, 90)
    assert cache_key(spec, 80) != key
    assert cache_key(replace(spec, num_warps=8), 90) != key
    assert cache_key(replace(spec, constants=(*spec.constants[:-1], ("BLOCK_D", 64))), 90) != key
    assert cache_key(replace(spec, module="latent_attention"), 90) != key


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[:200] + b"x" + b[201:], lambda b: b""])
def test_corrupt_cache_entry_is_rebuilt(damage, cache, caplog):
    """截断、改动、清空的缓存文件会被发现并重新编译，结果与原来相同。"""
    spec = next(s for s in specs(plans(90)[1]) if s.function == "combine")
    want = compile_kernel(spec, 90, cache)
    path = cache / f"{cache_key(spec, 90)}.kernel"
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert compile_kernel(spec, 90, cache) == want
    assert path.read_bytes() == good
    assert "已损坏" in caplog.text
    assert not [p for p in cache.iterdir() if p.suffix != ".kernel"], "没有留下临时文件"


def test_default_cache(monkeypatch, tmp_path):
    """遵守 XDG_CACHE_HOME。"""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "dsx/kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache/dsx/kernels"


def test_program_text_round_trip(cache):
    """程序 → 文本与 image → 程序，一字不差；同一个 kernel 的机器码只存一份。"""
    program = compile_plan(plans(90)[1], cache)
    text, image = program.to_text(), program.image
    assert Program.from_text(text, image) == program
    launches = [launch for v in program.variants for launch in v.launches]
    assert (len(launches), len({launch.kernel for launch in launches})) == (8, 6)
    assert len(image) == sum(len(k.cubin) for k in {launch.kernel for launch in launches})


def test_program_refuses_foreign_text(cache):
    """别的版本、截断的 image。"""
    program = compile_plan(plans(90)[1], cache)
    with pytest.raises(ValueError, match="dsx-program 1"):
        Program.from_text(program.to_text().replace("dsx-program 1", "dsx-program 2"), program.image)
    with pytest.raises(ValueError, match="image"):
        Program.from_text(program.to_text(), program.image[:-1])
    with pytest.raises(ValueError, match="image"):
        Program.from_text(program.to_text(), program.image + b"x")
    with pytest.raises(ValueError, match="不认识的行"):
        Program.from_text(program.to_text() + "cluster 2\n", program.image)
    with pytest.raises(ValueError, match="不认识的参数"):
        Program.from_text(program.to_text() + "argument int64 1\n", program.image)


def test_bind(cache):
    """代入形状：选对变体，网格、workspace 的偏移与整数参数已求值；没有 token 时只剩必要的启动。"""
    weights = [(256, 2048, 7168), (256, 2048, 7168), (256, 7168, 2048)]
    program = compile_plan(plans(90)[1], cache)

    def shapes(n):
        return [(n, 7168), (n, 8), (n, 8), *weights]

    small, large = program.bind(shapes(4)), program.bind(shapes(4096))
    assert [launch.kernel.entry for launch in small] == ["sort_pairs", "gate_up", "down", "combine"]
    assert small[1].kernel != large[1].kernel
    assert small[0].grid == (257, 1, 1)
    assert small[1].grid == ((4 * 8 // 16 + 32) * 64, 1, 1)
    assert program.workspace(shapes(4)) < program.workspace(shapes(4096))
    assert [launch.kernel.entry for launch in program.bind(shapes(0))] == ["sort_pairs"]
    with pytest.raises(ValueError, match="维 N 应为 4"):
        program.bind([(4, 7168), (5, 8), (4, 8), *weights])
    with pytest.raises(ValueError, match="个数或秩"):
        program.bind(shapes(4)[:-1])


@given(st.data())
def test_workspace_is_monotonic_and_sufficient(data):
    """按最大尺寸要的 workspace 对任何更小的尺寸、任何变体都够：TensorRT 只按最大尺寸问一次。"""
    plan = data.draw(st.sampled_from(plans(data.draw(st.sampled_from(list(SMS))))))
    names = {name for tensor in plan.inputs for name in tensor.dims if not name.isdigit()}
    large = {name: data.draw(st.integers(0, 300)) for name in sorted(names)}
    small = {name: data.draw(st.integers(0, size)) for name, size in large.items()}
    have = max(variant.workspace.evaluate(large) for variant in plan.variants)
    for variant in plan.variants:
        offsets = [
            argument.value.evaluate(small)
            for launch in variant.launches
            for argument in launch.arguments
            if argument.kind == "workspace"
        ]
        # 最后一块是 lse（注意力，4 字节一行）或各对的输出（专家）。
        if plan.op == "LatentAttention":
            grid = variant.launches[0].grid
            tail = small["B"] * grid[1].evaluate(small) * small["S"] * ATTENTION["num_heads"] * 4
        else:
            tail = small["N"] * EXPERTS["top_k"] * EXPERTS["hidden_size"] * 2
        assert max(offsets) + tail <= have


def test_splits_follow_the_card():
    """段数：把 SM 占满，不超过容量里的块数，至少一段。"""
    plan = plans(90)[0]

    def splits(B, S, T):
        sizes = {"B": B, "S": S, "T": T}
        variant = next(v for v in plan.variants if v.when.evaluate(sizes))
        return variant.launches[0].grid[1].evaluate(sizes)

    assert splits(1, 1, 32768) == 66
    assert splits(1, 1, 1024) == 16
    assert splits(128, 1, 32768) == 1
    assert splits(1, 1, 0) == 0, "没有缓存就没有启动"


def test_unknown_sm():
    """DSX-E901。"""
    with pytest.raises(DsxError, match="DSX-E901"):
        plans(75)


def test_without_triton(monkeypatch, cache):
    """DSX-E902。"""
    spec = specs(plans(90)[0])[0]
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(DsxError, match="DSX-E902"):
        compile_kernel(spec, 90, cache)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float32"}, {"cache_dtype": "int8"}, {"kv_lora_rank": 576}, {"qk_rope_head_dim": 128}],
)
def test_unsupported_problem(change):
    """DSX-E903。"""
    with pytest.raises(DsxError, match="DSX-E903"):
        latent_attention_plan(90, **{**ATTENTION, "dtype": "bfloat16", **change})


def test_too_much_shared_memory(cache):
    """DSX-E904：H100 的块放不进 99 KiB。"""
    spec = specs(plans(90)[1])[1]
    with pytest.raises(DsxError, match="DSX-E904"):
        compile_kernel(replace(spec, num_stages=8), 89, cache)


def test_unusable_cache_directory(tmp_path, cache):
    """DSX-E905：路径上有同名文件。"""
    (tmp_path / "cache").write_text("")
    with pytest.raises(DsxError, match="DSX-E905"):
        compile_kernel(specs(plans(90)[1])[0], 90, tmp_path / "cache")
