"""int8 缓存的两个 Triton kernel 的语义，同 test_kernels_interpreter.py，在子进程里用解释器跑（KERNEL-1、KERNEL-2、KERNEL-13）。"""

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
    from deepseek_export.kernels import latent_cache_update as update_kernels
    from deepseek_export.kernels.latent_attention_launch import latent_attention_launch
    from deepseek_export.kernels.latent_cache_update_launch import latent_cache_update_launch
    from deepseek_export.kernels.table import row_width
    from deepseek_export.ops.int8_cache import encode_rows, padded_rows
    from deepseek_export.ops.latent_attention import latent_attention
    from deepseek_export.ops.latent_cache_update import latent_cache_update
    from tests.unit.test_kernels_interpreter import MODULES, assert_close, poisoned, run

    MODULES["latent_cache_update"] = update_kernels

    def garbage(*shape, seed=0):
        """任意的字节。"""
        g = torch.Generator().manual_seed(seed)
        return torch.randint(-128, 128, shape, generator=g, dtype=torch.int32).to(torch.int8)

    # ------------------------------------------------------------ LatentCacheUpdate

    def check_update(c_kv, k_pe, T, past):
        """写进去的字节与参考实现逐位相同，别的行不动。"""
        (B, _, r), dr = c_kv.shape, k_pe.shape[-1]
        cache = garbage(B, 1, T, row_width(r, dr, "int8"))
        past_lens = torch.tensor(past, dtype=torch.int64)
        want = latent_cache_update(c_kv, k_pe, cache, past_lens)
        run(latent_cache_update_launch(89, r, dr, "float16"), (c_kv, k_pe, cache, past_lens), cache)
        assert torch.equal(cache, want)

    def new_rows(B, S, r, dr, dtype, seed=0):
        """每行的大小差很多。"""
        g = torch.Generator().manual_seed(seed)
        made = []
        for width in (r, dr):
            x = torch.randn(B, S, width, generator=g)
            made.append((x * torch.exp(4 * torch.randn(B, S, 1, generator=g))).to(dtype))
        return made

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(("r", "dr"), [(40, 12), (16, 16), (33, 5), (512, 64)])
    def test_update(r, dr, dtype):
        """KERNEL-1：一个与几个 token、空缓存、长度不等、宽度不是 16 的倍数；写到最后一行。"""
        for S, past in ((1, [0]), (3, [0, 5, 9])):
            check_update(*new_rows(len(past), S, r, dr, dtype), 12, past)

    def test_update_edges():
        """KERNEL-1：全零、无穷、最大、次正规的数，恰好一半的小数（取偶），与参考实现同样的字节。"""
        rows = [
            [0.0] * 8,
            [float("inf"), -float("inf"), 1.0, *[0.0] * 5],
            [3e38, -3e38, 1e30, *[1.0] * 5],
            [1e-45, -1e-40, 1e-38, *[0.0] * 5],
            [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5],
            [32512.0, 0.5, 1.5, 127.5, 128.5, -128.5, -127.5, 255.5],
        ]
        rows += [[2.0**e, *[2.0 ** (e - 7)] * 7] for e in range(-126, 127, 11)]
        x = torch.tensor(rows)[None]
        check_update(x, x.flip(-1).contiguous(), len(rows), [0])

    def test_update_outside_the_cache_writes_nothing():
        """KERNEL-2：放不下的、起点是负的，不写。"""
        c_kv, k_pe = new_rows(3, 4, 16, 8, torch.float32)
        before = garbage(3, 1, 6, row_width(16, 8, "int8"))
        cache, past = before.clone(), torch.tensor([4, -2, 100])
        run(latent_cache_update_launch(89, 16, 8, "float16"), (c_kv, k_pe, cache, past), cache)
        assert torch.equal(cache[2], before[2])
        assert torch.equal(cache[0, 0, :4], before[0, 0, :4])
        assert torch.equal(cache[1, 0, 2:], before[1, 0, 2:])
        for b, (i, at) in ((0, (0, 4)), (0, (1, 5)), (1, (2, 0)), (1, (3, 1))):
            want = encode_rows(c_kv[b, i], k_pe[b, i])
            assert torch.equal(cache[b, 0, at, : want.shape[-1]], want)

    def test_update_of_nothing():
        """S 为 0 时什么也不启动。"""
        c_kv, k_pe = new_rows(2, 0, 16, 8, torch.float32)
        check_update(c_kv, k_pe, 4, [0, 1])

    # ------------------------------------------------------------ LatentAttention

    def check_attention(B, S, H, r, dr, T, past, dtype, sm=89, seed=0, scale=None, sms=None, spread=0.0):
        """看不见的行是任意的字节，scale 可以极大：读到就会露馅。"""
        g = torch.Generator().manual_seed(seed)
        q = torch.randn(B, S, H, r + dr, generator=g).to(dtype)
        latents = torch.randn(B, 1, T, r + dr, generator=g)
        latents[..., :r] *= torch.exp(spread * torch.randn(B, 1, T, 1, generator=g))
        cache = padded_rows(encode_rows(latents[..., :r], latents[..., r:]), row_width(r, dr, "int8"))
        clean = cache.clone()
        for b, length in enumerate(past):
            cache[b, :, length + S :] = garbage(*cache[b, :, length + S :].shape)
        past_lens, scale = torch.tensor(past, dtype=torch.int64), scale or (r + dr) ** -0.5
        table = latent_attention_launch(sm, H, r, dr, scale, "float16", "int8")
        got = run(table, (q, cache, past_lens), poisoned(H, B * S, r, dtype=dtype), sms=sms)
        assert_close(got, latent_attention(q, clean, past_lens, scale, r))

    @pytest.mark.parametrize(
        ("S", "past", "dtype"),
        [
            (1, [0], torch.float16),
            (1, [0, 1, 95, 63], torch.float16),
            (2, [31, 32, 0], torch.float32),
            (5, [64, 3], torch.float32),
            (8, [0, 17], torch.float16),
        ],
    )
    def test_attention(S, past, dtype):
        """KERNEL-1：一个 token、空缓存、长度不等、S 从 1 到 8；H 与宽度都不是 2 的幂。"""
        check_attention(len(past), S, 6, 40, 12, 96, past, dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_attention_of_rows_unlike_in_size(dtype):
        """KERNEL-1：各行的 scale 差几个数量级，大的先来后来都有：累加器的单位逐块更新。"""
        for seed in range(2):
            check_attention(2, 1, 3, 16, 16, 200, [199, 97], dtype, spread=2.0, seed=seed, sms=3)

    def test_attention_several_blocks_per_program():
        """KERNEL-1：一个程序做好几块行、一块行有好几块 key，几个程序合看一块。"""
        past = [(37 * b) % 199 for b in range(9)]
        check_attention(9, 1, 3, 16, 16, 200, past, torch.float32, scale=0.6, sms=7)
        check_attention(2, 3, 12, 32, 16, 140, [130, 77], torch.float32, sms=5)

    def test_attention_v2_lite_shape():
        """KERNEL-1：发布模型的宽度（H=16，512+64），一行 656 个字节。"""
        assert row_width(512, 64, "int8") == 656
        check_attention(1, 1, 16, 512, 64, 80, [70], torch.float16)

    def test_attention_without_visible_keys():
        """KERNEL-2：有效长度不大于 0 的序列得到零；没有写过的（全零的）行也得到零。"""
        q, cache = torch.randn(2, 1, 4, 24), torch.zeros(2, 1, 32, row_width(16, 8, "int8"), dtype=torch.int8)
        table = latent_attention_launch(89, 4, 16, 8, 0.1, "float16", "int8")
        got = run(table, (q, cache, torch.tensor([-1, 9])), poisoned(4, 2, 16, dtype=torch.float32))
        assert not got.any()

    @pytest.mark.slow
    @settings(max_examples=15, deadline=None)
    @given(st.data())
    def test_attention_any_shape(data):
        """KERNEL-1：任意小形状、任意 SM 的块。"""
        draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
        B, S, H, r, dr = draw(1, 3), draw(1, 8), draw(1, 9), draw(1, 33), draw(1, 17)
        T = draw(S, 140)
        past = [draw(0, T - S) for _ in range(B)]
        sm = data.draw(st.sampled_from([80, 90, 120]))
        sms = draw(1, 40)
        check_attention(B, S, H, r, dr, T, past, torch.float32, sm=sm, seed=draw(0, 99), sms=sms, spread=1.0)
