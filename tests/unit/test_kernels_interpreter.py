"""Triton kernel 的语义：在 Triton 的解释器里运行，与 ``ops/`` 的参考实现比（KERNEL-1、KERNEL-2）。

解释器须在导入 triton 之前用环境变量打开，之后本进程就不能再编译；所以平时本文件只有一个测试，它在子进程里用解释器把本文件
再跑一遍。解释器的 bf16 点积是错的，这里只用 float32 与 float16。
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.unit

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
    def test_in_interpreter(chosen):
        """子进程里的全部测试通过；随机形状的慢，另跑。"""
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
        command += ["-m", chosen]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

else:
    import triton
    import triton.language as tl

    from deepseek_export.checkpoint.synthetic import quantize_fp8
    from deepseek_export.checkpoint.weight_only import BlockFormat, block_scales, dequantized, signed_codes
    from deepseek_export.dtypes import DTYPES
    from deepseek_export.kernels import grouped_swiglu as experts_kernels
    from deepseek_export.kernels import grouped_swiglu_launch as experts_launch
    from deepseek_export.kernels import latent_attention as attention_kernels
    from deepseek_export.kernels import quantized_linear as linear_kernels
    from deepseek_export.kernels import quantized_swiglu as quantized_kernels
    from deepseek_export.kernels.codes import E4M3, CodeFormat
    from deepseek_export.kernels.grouped_swiglu_launch import grouped_swiglu_launch
    from deepseek_export.kernels.latent_attention_launch import latent_attention_launch
    from deepseek_export.kernels.program import SM_COUNT, LaunchTable
    from deepseek_export.kernels.quantized_linear_launch import quantized_linear_launch
    from deepseek_export.kernels.quantized_swiglu_launch import quantized_swiglu_launch
    from deepseek_export.kernels.table import SMS
    from deepseek_export.kernels.widened import BFLOAT16_FACTOR, BFLOAT16_SHIFT, e4m3, moved
    from deepseek_export.ops.coded_weights import widened
    from deepseek_export.ops.latent_attention import latent_attention
    from deepseek_export.ops.moe_experts import moe_experts
    from deepseek_export.parity.measures import measure
    from deepseek_export.parity.tolerances import TOLERANCES
    from deepseek_export.reference.weights import by_torch, torch_dtype

    MODULES = {
        "latent_attention": attention_kernels,
        "grouped_swiglu": experts_kernels,
        "quantized_swiglu": quantized_kernels,
        "quantized_linear": linear_kernels,
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

    # ------------------------------------------------------------ MoeExperts

    def experts_inputs(N, D, E, inner, k, dtype, seed=0):
        g = torch.Generator().manual_seed(seed)
        ids = torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(N)]) if N else torch.zeros(0, k)
        weights = [
            torch.randn(E, *s, generator=g) * s[1] ** -0.5 for s in ((inner, D), (inner, D), (D, inner))
        ]
        x = torch.randn(N, D, generator=g)
        return (
            x.to(dtype),
            ids.to(torch.int32),
            torch.rand(N, k, generator=g),
            *(w.to(dtype) for w in weights),
        )

    def run_experts(inputs, sm=89):
        x, ids, _, w_gate, *_ = inputs
        E, inner, D = w_gate.shape
        table = grouped_swiglu_launch(sm, E, ids.shape[1], D, inner, "float16")
        return run(table, inputs, poisoned(*x.shape, dtype=x.dtype))

    def coded(weights, form, dtype):
        """浮点权重 [..., N, K] → 码、scale、还原的值；整数的与 ``ort-cpu`` 同样的码与 scale，e4m3 的与造检查点的相同。"""
        array = weights.numpy()
        if form.codes != E4M3:
            made = BlockFormat(kind=form.codes, block=form.columns, scale=str(dtype).removeprefix("torch."))
            codes, scales = signed_codes(array, made).view(np.int8), block_scales(array, made)
            return tuple(map(torch.from_numpy, (codes, scales, dequantized(array, made))))
        matrices = array.astype(np.float32).reshape(-1, *array.shape[-2:])
        pairs = [quantize_fp8(one, (form.rows, form.columns)) for one in matrices]
        codes, scales = (np.stack(one) for one in zip(*pairs, strict=True))
        codes, scales = (
            one.reshape(*array.shape[:-2], *one.shape[1:]) for one in (codes.view(np.int8), scales)
        )
        codes, scales = torch.from_numpy(codes), torch.from_numpy(scales)
        return codes, scales, widened(codes, scales, form.columns, form.rows, 1, dtype)

    def check_quantized(N, D, E, inner, k, dtype, form, sm=89, seed=0, idle=None):
        """没有 token 的专家 ``idle`` 的 scale 是 NaN，读到就会露馅。"""
        x, ids, weights, *floating = experts_inputs(N, D, E, inner, k, dtype, seed)
        if idle is not None:
            ids = torch.where(ids == idle, (idle + 1) % E, ids)
        made = [coded(one, form, dtype) for one in floating]
        for _, scales, _ in made if idle is not None else ():
            scales[idle] = float("nan")
        pairs = (tensor for codes, scales, _ in made for tensor in (codes, scales))
        table = quantized_swiglu_launch(sm, E, k, D, inner, "float16", form)
        got = run(table, (x, ids, weights, *pairs), poisoned(N, D, dtype=dtype))
        assert_close(got, moe_experts(x, ids, weights, *(restored for *_, restored in made)))

    def formats(block, rows=1):
        """三种码；e4m3 的 scale 管 ``rows`` 行。"""
        return [CodeFormat("int8", block), CodeFormat("int4", block), CodeFormat(E4M3, block, rows)]

    @pytest.mark.parametrize("kind", range(3), ids=["int8", "int4", "e4m3"])
    @pytest.mark.parametrize(
        ("N", "D", "E", "inner", "k", "block", "rows", "dtype"),
        [
            (1, 96, 12, 64, 4, 32, 32, torch.float32),
            (9, 64, 12, 96, 4, 32, 128, torch.float16),
            (5, 192, 3, 192, 2, 64, 48, torch.float32),
            (3, 128, 2, 256, 1, 128, 128, torch.float16),
            (150, 96, 2, 160, 2, 32, 20, torch.float32),
            (140, 256, 1, 128, 1, 128, 128, torch.float16),
        ],
    )
    def test_quantized_experts(N, D, E, inner, k, block, rows, dtype, kind):
        """三种码、三种 block、解码与 prefill 的变体；宽度超过一块也不满一块。"""
        check_quantized(N, D, E, inner, k, dtype, formats(block, rows)[kind])

    @pytest.mark.parametrize("form", formats(32, 32), ids=lambda form: form.codes)
    def test_quantized_experts_without_tokens_are_not_read(form):
        """没有 token 的专家的 scale 是 NaN，结果不变；一个 token 也没有时不写。"""
        check_quantized(7, 64, 5, 32, 2, torch.float32, form, idle=3)
        check_quantized(0, 64, 5, 32, 2, torch.float32, form)

    @pytest.mark.parametrize(("N", "k"), [(1, 2), (9, 3), (140, 2)])
    def test_fp8_blocks_that_are_not_full(N, k):
        """FP8 检查点边上的块可以不满：两个宽度都不是块的倍数，scale 也向上取整。"""
        check_quantized(N, 200, 3, 72, k, torch.float32, CodeFormat(E4M3, 128, 128))
        check_quantized(N, 40, 3, 104, k, torch.float16, CodeFormat(E4M3, 16, 24), sm=90)

    @pytest.mark.slow
    @settings(max_examples=5, deadline=None)
    @given(st.data())
    def test_quantized_experts_any_shape(data):
        """任意小形状、任意 SM 的块；整数的宽度是 block 的倍数。"""
        draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
        block = data.draw(st.sampled_from([32, 64]))
        form = data.draw(st.sampled_from(formats(block, draw(1, 70))))
        whole = block if form.codes != E4M3 else 1
        N, E = draw(0, 20), draw(1, 8)
        D, inner = (whole * draw(1, 3 if whole > 1 else 150) for _ in range(2))
        sm, seed = data.draw(st.sampled_from([80, 90, 120])), draw(0, 99)
        check_quantized(N, D, E, inner, draw(1, E), torch.float32, form, sm, seed)

    # ------------------------------------------------------------ QuantizedLinear

    def check_linear(B, S, N, K, dtype, form, sm=89, seed=0):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(B, S, K, generator=g).to(dtype)
        codes, scales, restored = coded((torch.randn(N, K, generator=g) * K**-0.5).to(dtype), form, dtype)
        table = quantized_linear_launch(sm, N, K, "float16", form)
        got = run(table, (x, codes, scales), poisoned(B, S, N, dtype=dtype))
        assert_close(got, torch.nn.functional.linear(x, restored))

    @pytest.mark.parametrize("form", formats(32, 24), ids=lambda form: form.codes)
    @pytest.mark.parametrize(
        ("B", "S", "N", "K", "dtype"),
        [
            (1, 1, 96, 1280, torch.float32),
            (3, 5, 40, 96, torch.float16),
            (7, 3, 200, 1088, torch.float16),
            (1, 70, 136, 160, torch.float32),
            (2, 0, 40, 64, torch.float32),
        ],
    )
    def test_quantized_linear(B, S, N, K, dtype, form):
        """一行、一块之内、几十行、不切段的；K 切成几段，最后一段不满；一行也没有就不写。"""
        check_linear(B, S, N, K, dtype, form)

    def test_quantized_linear_of_published_blocks():
        """FP8 的 128×128 块，宽度不是块的倍数；int8、int4 的 block 128。"""
        for form in formats(128, 128):
            check_linear(1, 4, 300, 640 if form.codes != E4M3 else 700, torch.float32, form, sm=90)

    def test_splits_are_summed_in_order():
        """切段的结果可复现：与逐段 float32 相加逐位相同。"""
        g = torch.Generator().manual_seed(0)
        partial, y = torch.randn(5, 1300, generator=g), poisoned(1300, dtype=torch.float16)
        linear_kernels.sum_splits[(2,)](partial, y, 1300, SPLITS=5, BLOCK=1024)
        want = torch.zeros(1300)
        for one in partial:
            want += one
        assert torch.equal(y, want.half())

    @triton.jit
    def every_code(bits, out, SHIFT: tl.constexpr):
        i = tl.arange(0, 256)
        code = tl.load(bits + i)
        tl.store(out + i, moved(code, SHIFT) if SHIFT else e4m3(code, out.dtype.element_ty))

    @pytest.mark.parametrize(
        ("dtype", "shift", "factor"),
        [
            (torch.float16, 0, 1.0),
            (torch.float32, 0, 1.0),
            # 解释器的 bfloat16 乘法也是错的：只看移好的位，乘 2 的幂交给 torch。
            (torch.bfloat16, BFLOAT16_SHIFT.value, BFLOAT16_FACTOR.value),
        ],
    )
    def test_every_e4m3_code_is_exact(dtype, shift, factor):
        """254 个有限的码放进 16 位浮点都准，含次正规数与负零。"""
        bits = torch.arange(256, dtype=torch.uint8)
        got = torch.empty(256, dtype=torch.int16 if shift else dtype)
        every_code[(1,)](bits.view(torch.int8), got, SHIFT=shift)
        value = (got.view(dtype) * factor).float()
        want, finite = bits.view(torch.float8_e4m3fn).float(), (bits & 0x7F) != 0x7F
        assert torch.equal(value[finite], want[finite])
        assert torch.equal(torch.signbit(value)[finite], torch.signbit(want)[finite])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(
        ("N", "D", "E", "inner", "k"),
        [(1, 48, 12, 28, 4), (9, 48, 12, 28, 4), (30, 48, 12, 28, 4), (70, 40, 2, 20, 1)],
    )
    def test_experts(N, D, E, inner, k, dtype):
        """一个 token、解码（排序与不排序）与 prefill 的变体；宽度不是 2 的幂。"""
        inputs = experts_inputs(N, D, E, inner, k, dtype)
        assert_close(run_experts(inputs), moe_experts(*inputs))

    @pytest.mark.parametrize("crowded", [False, True])
    def test_few_pairs_need_no_sort(crowded, monkeypatch):
        """对少时不启动排序，结果与排了序的逐位相同；挤在一个专家、一块装不下也是，编号不在范围内的不参与。"""
        inputs = list(experts_inputs(14, 40, 9, 24, 4, torch.float32))
        inputs[1][3, 1], inputs[1][5, 2] = -1, 9
        if crowded:
            inputs[1][:, 0] = 5
            inputs[1][:, 1] = 5
        got = run_experts(inputs)
        assert_close(got, moe_experts(*inputs))
        shapes = [tuple(one.shape) for one in inputs]
        unsorted = ["gate_up", "down", "combine"]
        for few, functions in ((64, unsorted), (16, ["sort_pairs", *unsorted])):
            monkeypatch.setattr(experts_launch, "FEW", few)
            table = grouped_swiglu_launch(89, 9, 4, 40, 24, "float16")
            assert [one.kernel.function for one in table.bind(shapes, 128)] == functions
        assert torch.equal(run_experts(inputs), got)

    def test_experts_wider_than_a_block():
        """小块的变体，内外两维都超过一块。"""
        inputs = experts_inputs(5, 150, 3, 140, 2, torch.float32)
        assert_close(run_experts(inputs), moe_experts(*inputs))

    def test_experts_large_variant():
        """每个专家的 token 装满大块时换大块；内外两维都超过一块。"""
        inputs = experts_inputs(150, 70, 2, 72, 2, torch.float32)
        assert_close(run_experts(inputs), moe_experts(*inputs))

    def test_experts_without_tokens_are_not_read():
        """没有 token 的专家的权重全是 NaN，结果不变；全部 token 挤在一个专家也行。"""
        inputs = list(experts_inputs(40, 32, 9, 16, 1, torch.float32))
        inputs[1] = torch.full((40, 1), 6, dtype=torch.int32)
        want = moe_experts(*inputs)
        for w in inputs[3:]:
            w[torch.arange(9) != 6] = float("nan")
        assert_close(run_experts(inputs), want)

    def test_no_tokens():
        """N=0 不产生任何写入。"""
        assert run_experts(experts_inputs(0, 32, 4, 16, 2, torch.float32)).shape == (0, 32)

    def test_ids_outside_the_range_contribute_nothing():
        """[0, E) 之外的编号与没有这一对相同。"""
        inputs = list(experts_inputs(7, 32, 5, 16, 2, torch.float32))
        inputs[1][::2, 1], inputs[1][1::2, 0] = -1, 5
        assert_close(run_experts(inputs), moe_experts(*inputs))

    def test_order_of_accumulation_is_fixed():
        """按槽位次序相加：与逐槽位 float32 累加逐位相同，所以同样的输入总得到同样的结果。"""
        inputs = experts_inputs(13, 32, 6, 16, 4, torch.float16)
        x, ids, weights, *w = inputs
        want = torch.zeros(13, 32)
        for j in range(4):
            one = run_experts((x, ids[:, j : j + 1].contiguous(), torch.ones(13, 1), *w))
            want += weights[:, j : j + 1] * one.float()
        assert torch.equal(run_experts(inputs), want.half())

    def test_combine_covers_every_column():
        """D 超过一块时每一列都写到。"""
        g = torch.Generator().manual_seed(0)
        rows, weights = torch.randn(6, 40, generator=g), torch.rand(2, 3, generator=g)
        ids, y = torch.zeros(2, 3, dtype=torch.int32), poisoned(2, 40, dtype=torch.float32)
        experts_kernels.combine[(2, 3)](rows, ids, weights, y, TOP_K=3, D=40, E=1, BLOCK_D=16)
        assert_close(y, (rows.view(2, 3, 40) * weights.unsqueeze(-1)).sum(1))

    def test_sort_is_stable():
        """排序稳定，起点是计数的前缀和，编号不在范围内的不参与。"""
        g = np.random.default_rng(0)
        ids = torch.from_numpy(g.integers(-1, 8, 2500).astype(np.int32))
        order, offsets = torch.full((2500,), -7, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
        experts_kernels.sort_pairs[(8,)](ids, order, offsets, 2500, 7, BLOCK=1024)
        valid = torch.where((ids >= 0) & (ids < 7), ids, 99)
        total = int((valid < 99).sum())
        assert torch.equal(order[:total], torch.sort(valid, stable=True)[1][:total].int())
        assert (order[total:] == -7).all()
        assert offsets.tolist() == [int((valid < e).sum()) for e in range(8)]

    @pytest.mark.slow
    @settings(max_examples=8, deadline=None)
    @given(st.data())
    def test_experts_any_shape(data):
        """任意小形状，含 N=0 与 k=E。"""
        draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
        N, D, E, inner = draw(0, 20), draw(1, 40), draw(1, 8), draw(1, 40)
        inputs = experts_inputs(N, D, E, inner, draw(1, E), torch.float32, seed=draw(0, 99))
        assert_close(run_experts(inputs, data.draw(st.sampled_from([80, 90, 120]))), moe_experts(*inputs))
