"""稀疏注意力的两个 Triton kernel 的语义，同 test_kernels_interpreter.py，在子进程里用解释器跑（KERNEL-1、KERNEL-2）。"""

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
    from deepseek_export.kernels import index_topk as index_kernels
    from deepseek_export.kernels import index_topk_launch as index_module
    from deepseek_export.kernels import sparse_latent_attention as attention_kernels
    from deepseek_export.kernels.index_topk_launch import index_topk_launch
    from deepseek_export.kernels.sparse_latent_attention_launch import sparse_latent_attention_launch
    from deepseek_export.ops.index_topk import index_topk
    from deepseek_export.ops.sparse_latent_attention import sparse_latent_attention
    from deepseek_export.reference.weights import by_torch
    from tests.unit.test_kernels_interpreter import MODULES, assert_close, poisoned, run

    MODULES["index_topk"] = index_kernels
    MODULES["sparse_latent_attention"] = attention_kernels

    # ------------------------------------------------------------ IndexTopK

    def index_inputs(B, S, H, di, T, past, dtype, spread, seed=0):
        """小整数：分数在 float32 里没有舍入，并列是真的并列，结果要逐个相同；没有写过的行是 NaN。"""
        g = torch.Generator().manual_seed(seed)
        q, k = (
            torch.randint(-spread, spread + 1, shape, generator=g) for shape in ((B, S, H, di), (B, 1, T, di))
        )
        w = torch.randint(-2, 3, (B, S, H), generator=g) / 4
        cache = k.float()
        for b, length in enumerate(past):
            cache[b, :, length + S :] = float("nan")
        return q.to(dtype), w, cache.to(dtype), torch.tensor(past, dtype=torch.int64)

    def check_index(B, S, H, di, T, past, topk, dtype=torch.float32, spread=2, sm=89, seed=0):
        q, w, cache, past_lens = index_inputs(B, S, H, di, T, past, dtype, spread, seed)
        counts, indices = torch.full((B, S), -7, dtype=torch.int32), torch.full((B, S, topk), -7)
        indices = indices.to(torch.int32)
        table = index_topk_launch(sm, H, di, topk, "float16", "float32" if dtype == torch.float32 else None)
        run(table, (q, w, cache, past_lens), indices, counts)
        want, number = index_topk(q, w, cache.nan_to_num(0), past_lens, topk)
        assert torch.equal(indices, want)
        assert torch.equal(counts, number)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("spread", [1, 40])
    @pytest.mark.parametrize(("S", "past"), [(1, [0]), (1, [95, 1, 23, 24]), (3, [22, 93]), (8, [0, 88, 17])])
    def test_index(S, past, spread, dtype):
        """KERNEL-1：名额 24 个：看得见的少于、恰好、多于名额，长短不一，S 到 8；并列很多与很少的分数。"""
        check_index(len(past), S, 5, 20, 96, past, 24, dtype, spread)

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_index_all_equal(value):
        """KERNEL-1：分数全相等（全零时 -0.0 与 0.0 也并列）：取最前面的。"""
        q, w, cache, past = index_inputs(1, 2, 4, 16, 80, [70], torch.float32, 1)
        w = torch.tensor([1.0, -1.0]).view(1, 2, 1).expand(1, 2, 4).contiguous() * value
        cache = cache.nan_to_num(0) * 0 + value
        indices, counts = torch.zeros(1, 2, 30, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
        run(index_topk_launch(89, 4, 16, 30, "float16", "float32"), (q, w, cache, past), indices, counts)
        assert torch.equal(indices, torch.arange(30, dtype=torch.int32).expand(1, 2, 30))
        assert counts.tolist() == [[30, 30]]

    def test_index_signs_and_magnitudes_are_ranked():
        """KERNEL-1：正的、负的、大的、小的、非规格化的，次序与 float32 的比较相同。"""
        values = torch.tensor([0.0, 1e-40, -1e-40, 1.5, -1.5, 3e38, -3e38, 1e-3, 7.0, -7.0])
        scores = values[torch.arange(2500) % 10].view(1, 2500)
        out, counts = torch.full((600,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        past = torch.tensor([2499])
        index_kernels.index_topk_select[(1,)](past, scores, out, counts, 1, 2500, TOPK=600, BLOCK=1024)
        want = torch.sort(scores[0], descending=True, stable=True)[1][:600].sort()[0]
        assert torch.equal(out, want.int())
        assert counts.item() == 600

    def test_index_more_scores_than_a_block():
        """KERNEL-1：一次读不完的分数：并列的个数与写到哪里都要跨过块。"""
        check_index(1, 1, 2, 16, 4500, [4400], 2100, spread=1, sm=121)

    def test_index_of_many_queries(monkeypatch):
        """KERNEL-1：query 多时一个程序从头到尾做一个又一个 query（sm121 至多 48 个程序），结果相同。"""
        monkeypatch.setattr(index_module, "SPLIT_QUERIES", 2)
        check_index(7, 7, 5, 20, 64, [(13 * b) % 50 for b in range(7)], 12, sm=121)
        check_index(3, 1, 3, 16, 64, [63, 2, 11], 12, torch.float16)

    def test_index_without_visible_keys():
        """KERNEL-2：有效长度不大于 0 的序列一个也不选，不影响同一批的其它序列。"""
        q, w, cache, _ = index_inputs(2, 1, 4, 16, 40, [5, 30], torch.float32, 3)
        past, indices = torch.tensor([-3, 30]), torch.zeros(2, 1, 8, dtype=torch.int32)
        counts = torch.full((2, 1), -7, dtype=torch.int32)
        run(index_topk_launch(89, 4, 16, 8, "float16", "float32"), (q, w, cache, past), indices, counts)
        assert counts.tolist() == [[0], [8]]
        assert indices[0].tolist() == [[-1] * 8]
        want, _ = index_topk(q[1:], w[1:], cache[1:].nan_to_num(0), past[1:], 8)
        assert torch.equal(indices[1:], want)

    @pytest.mark.slow
    @settings(max_examples=15, deadline=None)
    @given(st.data())
    def test_index_any_shape(data):
        """KERNEL-1：任意小形状、任意 SM 的块。"""
        draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
        B, S, H, di = draw(1, 3), draw(1, 8), draw(1, 20), draw(1, 33)
        T = draw(S, 140)
        past = [draw(0, T - S) for _ in range(B)]
        sm, topk = data.draw(st.sampled_from([80, 90, 120])), draw(1, 50)
        check_index(B, S, H, di, T, past, topk, spread=draw(1, 9), sm=sm, seed=draw(0, 99))

    def test_nothing_to_do():
        """没有 query 时什么也不启动。"""
        q, cache = torch.zeros(2, 0, 4, 16), torch.zeros(2, 1, 8, 16)
        past, indices = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 0, 8, dtype=torch.int32)
        counts = torch.zeros(2, 0, dtype=torch.int32)
        table = index_topk_launch(89, 4, 16, 8, "float16", "float32")
        assert run(table, (q, torch.zeros(2, 0, 4), cache, past), indices, counts).numel() == 0
        table = sparse_latent_attention_launch(89, 4, 8, 8, 8, 0.1, "float16", "float32")
        assert run(table, (q, cache, indices, counts), torch.zeros(4, 0, 8)).numel() == 0

    # ------------------------------------------------------------ SparseLatentAttention

    def attention_inputs(B, S, H, r, dr, T, counts, topk, dtype, cache_dtype=None, seed=0):
        """每个 query 随机选 ``counts`` 里的个数；谁也没有选中的行是 NaN，读到就会露馅。"""
        g = torch.Generator().manual_seed(seed)
        q, cache = torch.randn(B, S, H, r + dr, generator=g), torch.randn(B, 1, T, r + dr, generator=g)
        indices = torch.full((B, S, topk), -1, dtype=torch.int32)
        unread = torch.ones(B, T, dtype=torch.bool)
        number = torch.tensor(counts, dtype=torch.int32).view(B, S)
        for b in range(B):
            for i in range(S):
                n = int(number[b, i])
                rows = torch.randperm(T, generator=g)[:n].sort()[0]
                indices[b, i, :n] = rows
                unread[b, rows] = False
        cache[unread.unsqueeze(1)] = float("nan")
        return q.to(dtype), cache.to(cache_dtype or dtype), indices, number

    def check_attention(
        B, S, H, r, dr, T, counts, topk, dtype=torch.float32, cache_dtype=None, sm=89, seed=0, scale=None
    ):
        inputs = attention_inputs(B, S, H, r, dr, T, counts, topk, dtype, cache_dtype, seed)
        scale = scale or (r + dr) ** -0.5
        stored = cache_dtype and by_torch(cache_dtype).name
        table = sparse_latent_attention_launch(sm, H, r, dr, topk, scale, "float16", stored)
        got = run(table, inputs, poisoned(H, B * S, r, dtype=dtype))
        q, cache, *selection = inputs
        assert_close(got, sparse_latent_attention(q, cache.nan_to_num(0), *selection, scale, r))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(
        ("S", "counts"), [(1, [1]), (1, [40, 3, 1]), (2, [31, 32, 33, 40]), (8, range(1, 9))]
    )
    def test_attention(S, counts, dtype):
        """KERNEL-1：选中一个、不满名额、恰好满；S 到 8，各选各的；H 与宽度都不是 2 的幂。"""
        check_attention(len(counts) // S, S, 6, 40, 12, 96, list(counts), 40, dtype)

    def test_attention_several_blocks_per_split():
        """一段里有几块：最大值逐块更新。分数的幅度大，少一次重新缩放就露馅。"""
        counts = [(37 * b) % 180 + 1 for b in range(50)]
        check_attention(50, 1, 3, 16, 16, 200, counts, 190, torch.float16, scale=0.6, sm=121)

    def test_attention_more_heads_than_a_block():
        """头多于一个块，段也不止一个。"""
        check_attention(2, 2, 40, 32, 16, 300, [200, 7, 129, 64], 200, sm=80)
        check_attention(1, 1, 70, 32, 16, 300, [250], 256, sm=90)

    def test_attention_v32_widths():
        """发布模型的宽度（512+64）。"""
        check_attention(1, 1, 16, 512, 64, 120, [70], 96, torch.float16)

    def test_attention_wide_cache():
        """``mla.cache_dtype=float32``：缓存比 query 宽。"""
        check_attention(2, 2, 6, 40, 12, 96, [40, 3, 17, 1], 40, torch.float16, torch.float32)

    def test_attention_without_chosen_rows():
        """KERNEL-2：一行也没有选中的 query 得到零而不是 NaN，不影响别的。"""
        q, cache, indices, counts = attention_inputs(2, 2, 6, 40, 12, 96, [0, 5, 40, 0], 40, torch.float32)
        table = sparse_latent_attention_launch(89, 6, 40, 12, 40, 0.1, "float16", "float32")
        got = run(table, (q, cache, indices, counts), poisoned(6, 2 * 2, 40, dtype=torch.float32))
        got = got.view(6, 2, 2, 40).permute(1, 2, 0, 3)
        assert not got[0, 0].any()
        assert not got[1, 1].any()
        want = sparse_latent_attention(q, cache.nan_to_num(0), indices, counts.clamp(min=1), 0.1, 40)
        want = want.view(6, 2, 2, 40).permute(1, 2, 0, 3)
        assert_close(got[0, 1], want[0, 1])
        assert_close(got[1, 0], want[1, 0])

    @pytest.mark.slow
    @settings(max_examples=15, deadline=None)
    @given(st.data())
    def test_attention_any_shape(data):
        """KERNEL-1：任意小形状、任意 SM 的块。"""
        draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
        B, S, H, r, dr = draw(1, 3), draw(1, 8), draw(1, 9), draw(1, 33), draw(1, 17)
        T, topk = draw(1, 140), draw(1, 90)
        counts = [draw(1, min(T, topk)) for _ in range(B * S)]
        sm = data.draw(st.sampled_from([80, 90, 120]))
        check_attention(B, S, H, r, dr, T, counts, topk, sm=sm, seed=draw(0, 99))
