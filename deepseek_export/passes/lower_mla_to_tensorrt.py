"""``MlaAttention``、``SparseMlaAttention`` → TensorRT 的原生层，加上一个插件核。"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from deepseek_export.capture.bodies import latent_attention_body, latent_cache_update_body
from deepseek_export.capture.sparse_bodies import sparse_latent_attention_body
from deepseek_export.errors import DsxError
from deepseek_export.ops.table import (
    DOMAIN,
    LATENT_ATTENTION,
    LATENT_CACHE_UPDATE,
    MLA_ATTENTION,
    OPS,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    SPARSE_LATENT_ATTENTION,
    SPARSE_MLA_ATTENTION,
)
from deepseek_export.passes.base import GraphModule, Pass
from deepseek_export.passes.emitter import Emitter, dtype_of, shared_constants
from deepseek_export.passes.restore_latent import restore_latent
from deepseek_export.passes.selection import Selection
from deepseek_export.records import PassResult
from deepseek_export.reference.weights import torch_dtype

#: 一次至多多少个新 token 走插件核；再多就是 prefill。投机解码验证 K 个草稿时 S = K+1。
MAX_DECODE_TOKENS = 8

#: prefill 路径上的标准算子，TensorRT 把它融成一个原生核。
NATIVE_ATTENTION = "Attention"
#: prefill 看前几行缓存：每层一个节点，名字以它结尾；建引擎时换成由输入的形状给出（:mod:`~deepseek_export.engine.graph`）。
KEY_COUNT = "mla/used_keys"
#: 原生融合注意力核的宽度上限与步长（TensorRT-RTX 1.7，SM80、SM89、SM120 实测）。
_MAX_HEAD_WIDTH, _HEAD_WIDTH_STEP = 256, 8


class LowerMlaToTensorrtPass(Pass):
    """每个 ``MlaAttention``、``SparseMlaAttention`` 变成缓存写入加一条或两条注意力路径。

    改写：

    1. 缓存写入：``kv_cache_out = TensorScatter(kv_cache, [c_kv, k_pe], past_lens)``，TensorRT 认作 KV_CACHE_UPDATE，原地执行。
    2. ``mla.form=absorb``：解码路径。W_UK、W_UV 的吸收是按头分批的原生 MatMul，中间是 ``LatentAttention``。
    3. ``mla.form=naive``：prefill 路径。只取缓存的前 ``max(past_lens) + S`` 行，之后的对每个 query 都不可见；其中没有写过的行换成零（算的时候权重是 0，而 0 乘 NaN 还是 NaN），再展开成每头的 K、V，V 补零到与 K 同宽（原生注意力要求 Q、K、V 等宽），再用标准
       ``Attention``，最后切回 ``v_head_dim`` 列。
    4. ``mla.form=auto``：两条都在，S <= 8 走解码，否则走 prefill。不用 ``If``：它在 TensorRT 里带一次设备到主机的拷贝，而且
       分支里不能有插件。另一条路径的结果切成 0 行；每个优化配置的 S 都在分界的同一侧，编译器因此把走不到的那条整条删掉。
       ``Attention`` 自己至少算一行（ONNX Runtime 不接受空的 query），切成 0 行的是它的结果。
    7. ``SparseMlaAttention``：解码的插件核是 ``SparseLatentAttention``，只读选中的行；prefill 选中的写成遮罩，仍是一次原生注意力。

    8. 缓存是 int8 的（``mla.cache_dtype=int8``）：写入是插件 ``LatentCacheUpdate``，量化、就地写；一行末尾补零到 16 个字节的倍数，图的缓存输入输出随之改宽；
       解码的插件核直接读码，prefill 先还原（:mod:`~deepseek_export.passes.restore_latent`）。

    不改写：

    5. 没有这两种节点（MLA 关闭）。

    拒绝编译（``DSX-E320``）：

    6. 情形 3、4 里 Q、K 的宽度 ``qk_nope_head_dim + qk_rope_head_dim`` 或 ``v_head_dim`` 超过 256，没有原生核。

    9. ``SparseMlaAttention`` 的缓存是 int8 的（``DSX-E322``）：它的插件核只读浮点的缓存。

    名字：全部输入、``o``、``kv_cache_out`` 保留。
    """

    name: ClassVar[str] = "lower-mla-to-tensorrt"

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        sites = [*module.find(MLA_ATTENTION.name), *module.find(SPARSE_MLA_ATTENTION.name)]
        # 情形 5。
        if not sites:
            return PassResult(name=self.name, changed=False, count=0)
        constants = shared_constants(module.graph)
        for node in sites:
            emit = Emitter(node.name.rpartition("/")[0], constants)
            _Rewrite(module, node, emit).run()
            module.replace(node, emit.nodes)
        for core, (body, keys) in _CORES.items():
            for node in module.find(core)[:1]:
                dtypes = (torch_dtype(dtype_of(node.inputs[key]).name) for key in keys)
                module.functions[core] = body(module.config, *dtypes)
        return PassResult(name=self.name, changed=True, count=len(sites))


#: 插件 → 它的函数体，与决定函数体的 dtype 的是哪几个输入。
_CORES: dict[str, tuple[Callable[..., onnx.FunctionProto], tuple[int, ...]]] = {
    LATENT_ATTENTION.name: (latent_attention_body, (0, 1)),
    SPARSE_LATENT_ATTENTION.name: (sparse_latent_attention_body, (0, 1)),
    LATENT_CACHE_UPDATE.name: (latent_cache_update_body, (0,)),
}
_PLUGIN = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}


class _Rewrite:
    """一处改写。"""

    def __init__(self, module: GraphModule, node: gs.Node, emit: Emitter) -> None:
        self.form, self.config, self.emit = module.mla_form, module.config, emit
        self.scale = node.attrs["scale"]
        ports = dict(zip((port.name for port in OPS[node.op].inputs), node.inputs, strict=True))
        self.q_nope, self.q_pe = ports["q_nope"], ports["q_pe"]
        self.c_kv, self.k_pe = ports["c_kv"], ports["k_pe"]
        self.cache, self.past_lens, self.w_kv_b = ports["kv_cache"], ports["past_lens"], ports["w_kv_b"]
        self.o, self.cache_out = node.outputs
        sparse = node.op == SPARSE_MLA_ATTENTION.name
        self.selection = Selection(ports["indices"], ports["counts"]) if sparse else None
        c = self.config
        self.H, self.r = c.num_attention_heads, c.kv_lora_rank
        self.int8 = dtype_of(self.cache).name == "int8"
        self.dn, self.dr, self.dv = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim

    def run(self) -> None:
        """情形 1，再按 ``mla.form`` 走 2、3 或 4。"""
        if self.int8 and self.selection is not None:
            # 情形 9。
            raise DsxError(
                "DSX-E322", f"{self.emit.scope}：稀疏注意力的缓存是 int8", "用 --set mla.cache_dtype=float16"
            )
        self._write_cache()
        if self.form == "absorb":
            self._decode(self.q_nope, self.q_pe, self.selection, self.o)
        elif self.form == "naive":
            cache = self._first_rows(self._key_count(self._new_count()))
            self._prefill(self.q_nope, self.q_pe, self.selection, cache, self.o)
        else:
            self._both()

    def _write_cache(self) -> None:
        """情形 1；int8 的是情形 8。"""
        emit = self.emit
        if self.int8:
            for tensor in (self.cache, self.cache_out):
                tensor.shape = [*tensor.shape[:-1], self.config.latent_cache_width(True, aligned=True)]
            given = [self.c_kv, self.k_pe, self.cache, self.past_lens]
            op = LATENT_CACHE_UPDATE.name
            emit.add(op, given, f"mla/{op}", [self.cache_out], domain=DOMAIN, **_PLUGIN)
            return
        rows = emit("Concat", [self.c_kv, self.k_pe], "mla/rows", self.c_kv, axis=-1)
        rows = emit("Unsqueeze", [rows, emit.ints(1)], "mla/new", self.c_kv)
        if self.cache.dtype != self.c_kv.dtype:
            rows = emit("Cast", [rows], "mla/new_cast", self.cache, to=dtype_of(self.cache).onnx)
        emit.add("TensorScatter", [self.cache, rows, self.past_lens], "mla/TensorScatter", [self.cache_out])

    def _new_count(self) -> gs.Variable:
        """S，[1]。"""
        return self.emit("Shape", [self.q_nope], "mla/S", np.int64, [1], start=1, end=2)

    def _key_count(self, S: gs.Variable) -> gs.Variable:
        """``max(past_lens) + S``，[1]。"""
        emit = self.emit
        past = emit(
            "ReduceMax", [self.past_lens, emit.ints(0)], "mla/longest_past", np.int64, [1], keepdims=1
        )
        return emit("Add", [past, S], KEY_COUNT, np.int64, [1])

    def _first_rows(self, count: gs.Variable) -> gs.Variable:
        """写好的缓存的前 ``count`` 行。"""
        emit = self.emit
        bounds = [emit.ints(0), count, emit.ints(2)]
        return emit("Slice", [self.cache_out, *bounds], "mla/prefill_cache", self.cache)

    def _both(self) -> None:
        """情形 4：两条路径各取 ``S`` 行或 0 行。"""
        emit, zero, axis = self.emit, self.emit.ints(0), self.emit.ints(1)
        one, limit = emit.ints(1), emit.ints(MAX_DECODE_TOKENS)
        S = self._new_count()
        key_count = self._key_count(S)
        flags = {}
        for path, op in (("decode", "LessOrEqual"), ("prefill", "Greater")):
            flag = emit(op, [S, limit], f"mla/is_{path}", np.bool_, [1])
            flags[path] = emit("Cast", [flag], f"mla/{path}_flag", np.int64, [1], to=onnx.TensorProto.INT64)
        decode_rows = emit("Mul", [S, flags["decode"]], "mla/decode_rows", np.int64, [1])
        prefill_rows = emit("Mul", [S, flags["prefill"]], "mla/prefill_rows", np.int64, [1])
        cache_rows = emit("Mul", [key_count, flags["prefill"]], "mla/prefill_cache_rows", np.int64, [1])
        attention_rows = emit("Max", [prefill_rows, one], "mla/attention_rows", np.int64, [1])
        attention_keys = emit("Max", [cache_rows, one], "mla/attention_keys", np.int64, [1])

        def head(path: str, rows: gs.Tensor) -> tuple[gs.Variable, gs.Variable, Selection | None]:
            q_nope = emit("Slice", [self.q_nope, zero, rows, axis], f"mla/{path}_q_nope", self.q_nope)
            q_pe = emit("Slice", [self.q_pe, zero, rows, axis], f"mla/{path}_q_pe", self.q_pe)
            return q_nope, q_pe, self.selection and self.selection.head(emit, path, rows)

        cache = self._first_rows(attention_keys)
        o_decode, o_prefill = (
            gs.Variable(f"{emit.scope}/mla/o_{path}", self.o.dtype) for path in ("decode", "prefill")
        )
        self._decode(*head("decode", decode_rows), o_decode)
        self._prefill(*head("prefill", attention_rows), cache, o_prefill, prefill_rows)
        emit.add("Concat", [o_decode, o_prefill], "mla/join", [self.o], axis=1)

    def _decode(
        self, q_nope: gs.Tensor, q_pe: gs.Tensor, selection: Selection | None, o: gs.Variable
    ) -> None:
        """情形 2、7：``q = [q_nope W_UK, q_pe]``，``o = LatentAttention(q) W_UVᵀ``。"""
        emit, H, r = self.emit, self.H, self.r
        heads = emit("Reshape", [self.w_kv_b, emit.ints(H, self.dn + self.dv, r)], "mla/w_heads", self.w_kv_b)
        w_uk, w_uv = emit.split(heads, (self.dn, self.dv), ("mla/w_uk", "mla/w_uv"), axis=1)
        w_uv = emit("Transpose", [w_uv], "mla/w_uv_t", w_uv, [H, r, self.dv], perm=[0, 2, 1])
        outer = emit("Shape", [q_pe], "mla/decode_BS", np.int64, [2], start=0, end=2)
        q_latent = self._per_head(self._by_head(q_nope, "absorb_q"), w_uk, outer, r, "absorb_q")
        q = emit("Concat", [q_latent, q_pe], "mla/q", q_pe, ["B", "Sd", H, r + self.dr], axis=-1)
        core, keys = LATENT_ATTENTION.name, [self.past_lens]
        if selection is not None:
            core, keys = SPARSE_LATENT_ATTENTION.name, [selection.indices, selection.counts]
        context = emit(
            core,
            [q, self.cache_out, *keys],
            core,
            q_pe,
            [H, "BSd", r],
            domain=DOMAIN,
            scale=self.scale,
            kv_lora_rank=r,
            **_PLUGIN,
        )
        self._per_head(context, w_uv, outer, self.dv, "absorb_o", o)

    def _by_head(self, x: gs.Tensor, name: str) -> gs.Variable:
        """``x [B, S, H, dn]`` → ``[H, B*S, dn]``。"""
        emit = self.emit
        flat = emit("Reshape", [x, emit.ints(-1, self.H, self.dn)], f"mla/{name}_flat", x)
        return emit("Transpose", [flat], f"mla/{name}_by_head", x, perm=[1, 0, 2])

    def _per_head(
        self,
        by_head: gs.Tensor,
        weight: gs.Tensor,
        outer: gs.Tensor,
        width: int,
        name: str,
        out: gs.Variable | None = None,
    ) -> gs.Variable:
        """``by_head [H, B*S, inner]`` 逐头乘 ``weight [H, inner, width]``，得到 ``[B, S, H, width]``。批在头上，权重不必沿 B 复制。"""
        emit, x = self.emit, by_head
        product = emit("MatMul", [by_head, weight], f"mla/{name}", x)
        product = emit("Transpose", [product], f"mla/{name}_by_token", x, perm=[1, 0, 2])
        shape = emit("Concat", [outer, emit.ints(self.H, width)], f"mla/{name}_shape", np.int64, [4], axis=0)
        if out is None:
            return emit("Reshape", [product, shape], f"mla/{name}_out", x, allowzero=1)
        emit.add("Reshape", [product, shape], f"mla/{name}_out", [out], allowzero=1)
        return out

    def _prefill(
        self,
        q_nope: gs.Tensor,
        q_pe: gs.Tensor,
        selection: Selection | None,
        cache: gs.Tensor,
        o: gs.Variable,
        rows: gs.Tensor | None = None,
    ) -> None:
        """情形 3、7；``rows`` 是要留下的行数，``None`` 为全部。"""
        emit, H = self.emit, self.H
        width = self.dn + self.dr
        padded = -(-max(width, self.dv) // _HEAD_WIDTH_STEP) * _HEAD_WIDTH_STEP
        if padded > _MAX_HEAD_WIDTH:
            # 情形 6。
            raise DsxError(
                "DSX-E320",
                f"{emit.scope}：qk_nope_head_dim + qk_rope_head_dim = {width}、v_head_dim = {self.dv}，"
                f"原生融合注意力至多 {_MAX_HEAD_WIDTH} 列",
                "用 --set mla.form=absorb，只走插件核",
            )
        q = emit("Concat", [q_nope, q_pe], "mla/q_heads", q_nope, axis=-1)
        q = emit("Transpose", [self._pad(q, padded - width, "q")], "mla/Q", q, perm=[0, 2, 1, 3])
        latent = emit("Squeeze", [cache, emit.ints(1)], "mla/latent", cache)
        if self.int8:
            latent.shape = ["B", "P", self.cache_out.shape[-1]]
            latent = restore_latent(emit, latent, self.r, self.dr, q_nope)
        elif cache.dtype != q_nope.dtype:
            latent = emit("Cast", [latent], "mla/latent_cast", q_nope, to=dtype_of(q_nope).onnx)
        mask, written = self._masks(q_pe, latent, selection)
        zero = emit("Cast", [emit.int0d(0)], "mla/zero", latent, [], to=dtype_of(latent).onnx)
        latent = emit("Where", [written, latent, zero], "mla/written_latent", latent)
        c_kv, k_pe = emit.split(latent, (self.r, self.dr), ("mla/c_kv", "mla/k_pe"), axis=2)
        w = emit("Transpose", [self.w_kv_b], "mla/w_kv_b_t", self.w_kv_b, perm=[1, 0])
        kv = emit("MatMul", [c_kv, w], "mla/expand", q)
        kv = emit("Reshape", [kv, emit.ints(0, 0, H, self.dn + self.dv)], "mla/kv_heads", q)
        kv = emit("Transpose", [kv], "mla/kv", q, perm=[0, 2, 1, 3])
        k_nope, v = emit.split(kv, (self.dn, self.dv), ("mla/k_nope", "mla/v"), axis=3)
        k_pe = emit("Unsqueeze", [k_pe, emit.ints(1)], "mla/k_pe_one_head", q)
        k_pe = emit("Expand", [k_pe, emit.ints(1, H, 1, 1)], "mla/k_pe_heads", q)
        k = emit("Concat", [k_nope, k_pe], "mla/k", q, axis=-1)
        k, v = self._pad(k, padded - width, "k"), self._pad(v, padded - self.dv, "v")
        attended = emit(NATIVE_ATTENTION, [q, k, v, mask], "mla/Attention", q, scale=self.scale)
        if padded > self.dv:
            columns = [emit.ints(0), emit.ints(self.dv), emit.ints(3)]
            attended = emit("Slice", [attended, *columns], "mla/attended", q)
        if rows is not None:
            kept = [emit.ints(0), rows, emit.ints(2)]
            attended = emit("Slice", [attended, *kept], "mla/attended_rows", q)
        emit.add("Transpose", [attended], "mla/o_by_token", [o], perm=[0, 2, 1, 3])

    def _pad(self, tensor: gs.Tensor, columns: int, name: str) -> gs.Tensor:
        """末维补 ``columns`` 列零。"""
        if not columns:
            return tensor
        return self.emit("Pad", [tensor, self.emit.ints(*[0] * 7, columns)], f"mla/{name}_padded", tensor)

    def _masks(
        self, rows: gs.Tensor, keys: gs.Tensor, selection: Selection | None
    ) -> tuple[gs.Tensor, gs.Tensor]:
        """[B, 1, S, T] bool，True 表示要看：``j <= past_lens[b] + i``，或选中的；[B, T, 1] bool，True 表示写过：``j < past_lens[b] + S``。"""
        emit = self.emit
        counts, positions = {}, {}
        for name, tensor in (("row", rows), ("key", keys)):
            counts[name] = emit("Shape", [tensor], f"mla/{name}_count", np.int64, [1], start=1, end=2)
            count = emit("Squeeze", [counts[name], emit.ints(0)], f"mla/{name}_count_0d", np.int64, [])
            positions[name] = emit(
                "Range", [emit.int0d(0), count, emit.int0d(1)], f"mla/{name}_positions", np.int64
            )
        past = emit("Unsqueeze", [self.past_lens, emit.ints(1)], "mla/past", np.int64)
        length = emit("Add", [past, counts["row"]], "mla/length", np.int64)
        length = emit("Unsqueeze", [length, emit.ints(2)], "mla/length_3d", np.int64)
        keys_3d = emit("Unsqueeze", [positions["key"], emit.ints(1)], "mla/key_positions_2d", np.int64)
        written = emit("Less", [keys_3d, length], "mla/written", np.bool_)
        if selection is not None:
            return selection.mask(emit, counts["key"]), written
        last = emit("Add", [past, positions["row"]], "mla/last_visible", np.int64)
        last = emit("Unsqueeze", [last, emit.ints(1, 3)], "mla/last_visible_4d", np.int64)
        return emit("LessOrEqual", [positions["key"], last], "mla/visible", np.bool_), written
