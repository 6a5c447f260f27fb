"""专家与读码的线性层的 Triton kernel 的语义，同 test_kernels_interpreter.py，在子进程里用解释器跑（KERNEL-1、KERNEL-2）。"""

from __future__ import annotations

import os

import numpy as np
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

    from deepseek_export.checkpoint.synthetic import quantize_fp8
    from deepseek_export.checkpoint.weight_only import BlockFormat, block_scales, dequantized, signed_codes
    from deepseek_export.kernels import grouped_swiglu as experts_kernels
    from deepseek_export.kernels import grouped_swiglu_launch as experts_launch
    from deepseek_export.kernels import quantized_linear as linear_kernels
    from deepseek_export.kernels import quantized_swiglu as quantized_kernels
    from deepseek_export.kernels.codes import E4M3, CodeFormat
    from deepseek_export.kernels.grouped_swiglu_launch import grouped_swiglu_launch
    from deepseek_export.kernels.quantized_linear_launch import quantized_linear_launch
    from deepseek_export.kernels.quantized_swiglu_launch import quantized_swiglu_launch
    from deepseek_export.kernels.widened import BFLOAT16_FACTOR, BFLOAT16_SHIFT, e4m3, moved
    from deepseek_export.ops.coded_weights import widened
    from deepseek_export.ops.moe_experts import moe_experts
    from tests.unit.test_kernels_interpreter import MODULES, assert_close, poisoned, run

    MODULES["grouped_swiglu"] = experts_kernels
    MODULES["quantized_swiglu"] = quantized_kernels
    MODULES["quantized_linear"] = linear_kernels

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
