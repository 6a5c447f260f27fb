"""Triton kernel 的语义：在 Triton 的解释器里运行，与 ``ops/`` 的参考实现比（KERNEL-1、KERNEL-2）。这里是 latent 注意力，与各文件共用的启动。

解释器须在导入 triton 之前用环境变量打开，之后本进程就不能再编译；所以平时本文件只有一个测试，它在子进程里用解释器把本文件
再跑一遍。解释器的 bf16 点积是错的，这里只用 float32 与 float16。
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interpreter import run_in_interpreter

pytestmark = [pytest.mark.unit, pytest.mark.heavy]

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
    def test_in_interpreter(chosen):
        """子进程里的全部测试通过；随机形状的慢，另跑。"""
        run_in_interpreter(__file__, chosen)

else:
    import triton
    import triton.language as tl

    from deepseek_export.dtypes import DTYPES
    from deepseek_export.kernels import latent_attention as attention_kernels
    from deepseek_export.kernels.latent_attention_launch import latent_attention_launch
    from deepseek_export.kernels.program import SM_COUNT, LaunchTable
    from deepseek_export.kernels.table import SMS
    from deepseek_export.ops.latent_attention import latent_attention
    from deepseek_export.parity.measures import measure
    from deepseek_export.parity.tolerances import TOLERANCES
    from deepseek_export.reference.weights import by_torch, torch_dtype

    MODULES = {
        "latent_attention": attention_kernels,
    }
    #: 参数类型 → 张量 dtype；``*fp16`` 换成正在测试的 dtype（编译只收两字节的，解释器里也测 float32）。
    POINTEES = {DTYPES[name].triton: torch_dtype(name) for name in ("float32", "int32", "int64")}
    CANARY = 64

    @triton.jit
    def spans(starts, owners, total, programs):
        for program in range(0, programs + 1):
            tl.store(starts + program, attention_kernels.span_start(program, total, programs))
        for cell in range(0, total):
            tl.store(owners + cell, attention_kernels.owner(cell, total, programs))

    def run(table: LaunchTable, inputs, *outputs, sms=None):
        """按启动表在解释器里执行，返回第一个输出：workspace 预先填满 NaN，每一块后面有哨兵，越界写会露馅。"""
        sizes = {}
        for tensor, value in zip(table.inputs, inputs, strict=True):
            assert len(tensor.dims) == value.dim()
            shape = list(value.shape)
            if tensor.dtype == "int4":
                shape[-1] *= 2  # 两个码一字节
            for name, size in zip(tensor.dims, shape, strict=True):
                assert size == (int(name) if name.isdigit() else sizes.setdefault(name, size))
        sizes[SM_COUNT] = sms or SMS[table.sm].most
        variant = next(v for v in table.variants if v.when.evaluate(sizes))
        regions = {}
        for launch in variant.launches:
            for (_, kind), argument in zip(launch.kernel.signature, launch.arguments, strict=True):
                if argument.kind == "workspace":
                    regions[argument.value.evaluate(sizes)] = kind
        ends = [*sorted(regions), variant.workspace.evaluate(sizes)][1:]
        workspace = {}
        for start, end in zip(sorted(regions), ends, strict=True):
            kind = regions[start]
            count = (end - start) // (2 if kind == "*fp16" else 4)
            value = torch.empty(count + CANARY, dtype=POINTEES.get(kind, outputs[0].dtype))
            workspace[start] = value.fill_(float("nan") if value.is_floating_point() else -(2**31))
        guards = {start: value[-CANARY:].clone() for start, value in workspace.items()}
        for launch in variant.launches:
            grid = tuple(axis.evaluate(sizes) for axis in launch.grid)
            if 0 in grid:
                continue
            values = {"input": inputs, "output": outputs}
            arguments = [
                values[a.kind][a.value]
                if a.kind in values
                else workspace[a.value.evaluate(sizes)]
                if a.kind == "workspace"
                else a.value.evaluate(sizes)
                if a.kind == "int32"
                else a.value
                for a in launch.arguments
            ]
            kernel = getattr(MODULES[launch.kernel.module], launch.kernel.function)
            kernel[grid](*arguments, **dict(launch.kernel.constants))
        for start, value in workspace.items():
            assert torch.equal(value[-CANARY:].nan_to_num(7), guards[start].nan_to_num(7)), "越界写"
        return outputs[0]

    def poisoned(*shape, dtype):
        return torch.full(shape, float("nan"), dtype=dtype)

    def assert_close(got, want):
        name = str(want.dtype).removeprefix("torch.")
        m = measure(got.float().numpy(), want.float().numpy())
        assert TOLERANCES["op", name].accepts(m), m

    # ------------------------------------------------------------ LatentAttention

    def attention_inputs(B, S, H, r, dr, T, past, dtype, cache_dtype=None, seed=0):
        """看不见的缓存行是 NaN：读到就会露馅。"""
        g = torch.Generator().manual_seed(seed)
        q = torch.randn(B, S, H, r + dr, generator=g).to(dtype)
        cache = torch.randn(B, 1, T, r + dr, generator=g)
        for b, length in enumerate(past):
            cache[b, :, length + S :] = float("nan")
        return q, cache.to(cache_dtype or dtype), torch.tensor(past, dtype=torch.int64)

    def check_attention(
        B, S, H, r, dr, T, past, dtype, cache_dtype=None, sm=89, seed=0, scale=None, sms=None
    ):
        q, cache, past_lens = attention_inputs(B, S, H, r, dr, T, past, dtype, cache_dtype, seed)
        scale = scale or (r + dr) ** -0.5
        table = latent_attention_launch(
            sm, H, r, dr, scale, "float16", cache_dtype and by_torch(cache_dtype).name
        )
        got = run(table, (q, cache, past_lens), poisoned(H, B * S, r, dtype=dtype), sms=sms)
        want = latent_attention(q, cache.nan_to_num(0), past_lens, scale, r)
        assert_close(got, want)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(
        ("S", "past"),
        [(1, [0]), (1, [0, 1, 95, 63]), (2, [31, 32, 0]), (3, [0, 0]), (5, [64, 3]), (8, [0, 88, 17])],
    )
    def test_attention(S, past, dtype):
        """一个 token、空缓存、长度不等、S 从 1 到 8；H 与宽度都不是 2 的幂。"""
        check_attention(len(past), S, 6, 40, 12, 96, past, dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_attention_several_blocks_per_program(dtype):
        """一个程序做好几块行、一块行有好几块 key：最大值逐块更新。分数的幅度大，少一次重新缩放就露馅。"""
        past = [(37 * b) % 199 for b in range(44)]
        check_attention(44, 1, 3, 16, 16, 200, past, dtype, scale=0.6, sms=7)

    def test_attention_more_parts_than_reduce_reads_at_once():
        """SM 多、批小、上下文长：合看的程序超过 reduce 一次读的 64 份；分数的幅度大，各份的权重差得远。"""
        check_attention(1, 1, 2, 24, 16, 3000, [2990], torch.float32, sm=120, scale=0.6)

    def test_attention_with_one_program():
        """只有一个程序：全部行它自己写，reduce 不启动。"""
        table = latent_attention_launch(89, 2, 16, 16, 0.1, "float16")
        sizes = {"B": 5, "S": 1, "T": 64, SM_COUNT: 1}
        reduce = next(v for v in table.variants if v.when.evaluate(sizes)).launches[1]
        assert 0 in [axis.evaluate(sizes) for axis in reduce.grid]
        check_attention(5, 1, 2, 16, 16, 64, [0, 63, 31, 32, 7], torch.float32, sms=1)

    def test_attention_of_plenty_is_divided_by_blocks():
        """活多的按整块分，活少的按一个一个的 key 分：同样的输入、不同的 SM 个数，两种都对。"""
        sizes = (3, 2, 5, 16, 16, 700, [690, 3, 400], torch.float32)
        for sms in (1, 2, 9, 140):
            check_attention(*sizes, sms=sms)

    def test_attention_of_many_sequences():
        """序列多于一次看的 128 个，长短悬殊：每个程序都找得到自己的那一段。"""
        past = [(0, 500, 3, 31, 97)[b % 5] for b in range(150)]
        check_attention(150, 1, 1, 16, 16, 512, past, torch.float32, sms=9)

    @pytest.mark.parametrize("programs", [1, 2, 3, 7, 64])
    def test_spans_are_even_and_inverse(programs):
        """各程序的一段首尾相接，至多差一格；``owner`` 认得每一格是谁的。"""
        for total in (1, 2, 63, 64, 65, 1000):
            starts = torch.empty(programs + 1, dtype=torch.int32)
            owners = torch.empty(total, dtype=torch.int32)
            spans[(1,)](starts, owners, total, programs)
            sizes = starts.diff().tolist()
            assert (int(starts[0]), int(starts[-1])) == (0, total)
            assert max(sizes) - min(sizes) <= 1
            assert owners.tolist() == [p for p, size in enumerate(sizes) for _ in range(size)]

    def test_attention_v2_lite_shape():
        """发布模型的宽度（H=16，512+64）。"""
        check_attention(1, 1, 16, 512, 64, 80, [70], torch.float16)

    def test_attention_more_rows_than_a_block():
        """S*H 超过最大的行块；程序的一段从一块行中间起，跨过几块行。"""
        check_attention(1, 3, 24, 32, 16, 40, [30], torch.float32)
        check_attention(3, 3, 24, 32, 16, 140, [130, 5, 77], torch.float32, sms=5)

    @pytest.mark.parametrize("S", [1, 3])
    def test_attention_of_clear_blocks(S):
        """Hopper 的大块：整块都看得见的另走一个循环。没有整块的、恰好整块的、各 query 看得见的不一样多的，一段从块的中间起。"""
        check_attention(4, S, 24, 32, 16, 140, [0, 95, 31, 130], torch.float32, sm=90, sms=5)
        check_attention(1, S, 70, 32, 16, 140, [96 - S], torch.float16, sm=90, sms=1)

    def test_attention_wide_cache():
        """``mla.cache_dtype=float32``：缓存比 query 宽。"""
        check_attention(2, 2, 6, 40, 12, 96, [90, 3], torch.float16, torch.float32)

    def test_attention_without_visible_keys():
        """有效长度不大于 0 的序列得到零而不是 NaN，不影响同一批的其它序列。"""
        q, cache, _ = attention_inputs(3, 2, 6, 40, 12, 96, [5, 5, 90], torch.float32)
        past_lens = torch.tensor([-2, -1, 90])
        table = latent_attention_launch(89, 6, 40, 12, 0.1, "float16")
        got = run(table, (q, cache, past_lens), poisoned(6, 3 * 2, 40, dtype=torch.float32))
        got = got.view(6, 3, 2, 40).permute(1, 2, 0, 3)
        assert not got[0].any()
        assert not got[1, 0].any()
        assert torch.equal(got[1, 1], cache[1, 0, 0, :40].expand(6, -1)), "只看得见一个 key"
        want = latent_attention(q[2:], cache[2:].nan_to_num(0), past_lens[2:], 0.1, 40)
        assert_close(got[2], want.transpose(0, 1))

    def test_attention_of_nothing():
        """S 为 0 时什么也不启动。"""
        inputs = attention_inputs(2, 0, 6, 40, 12, 32, [3, 4], torch.float32)
        table = latent_attention_launch(89, 6, 40, 12, 0.1, "float16")
        assert run(table, inputs, poisoned(6, 0, 40, dtype=torch.float32)).shape == (6, 0, 40)

    @pytest.mark.slow
    @settings(max_examples=15, deadline=None)
    @given(st.data())
    def test_attention_any_shape(data):
        """任意小形状、任意 SM 的块。"""
        draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
        B, S, H, r, dr = draw(1, 3), draw(1, 8), draw(1, 9), draw(1, 33), draw(1, 17)
        T = draw(S, 140)
        past = [draw(0, T - S) for _ in range(B)]
        sm = data.draw(st.sampled_from([80, 90, 120]))
        sms = draw(1, 40)
        check_attention(B, S, H, r, dr, T, past, torch.float32, sm=sm, seed=draw(0, 99), sms=sms)
