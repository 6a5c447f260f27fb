"""稀疏注意力每个 query 选中的 key，在下沉到 TensorRT 的图里的两种用法。"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from deepseek_export.passes.emitter import Emitter


@dataclass(frozen=True)
class Selection:
    """选中的 key；契约见 :data:`~deepseek_export.ops.table.SPARSE_MLA_ATTENTION`。

    Attributes:
        indices: [B, S, ks] int32。
        counts: [B, S] int32。
    """

    indices: gs.Tensor
    counts: gs.Tensor

    def head(self, emit: Emitter, path: str, rows: gs.Tensor) -> Selection:
        """前 ``rows`` 个 query 的。"""
        bounds = [emit.ints(0), rows, emit.ints(1)]
        indices = emit("Slice", [self.indices, *bounds], f"mla/{path}_indices", self.indices)
        return Selection(indices, emit("Slice", [self.counts, *bounds], f"mla/{path}_counts", self.counts))

    def mask(self, emit: Emitter, keys: gs.Tensor) -> gs.Tensor:
        """写成遮罩：[B, 1, S, T] bool，True 是选中的；``keys`` 是 T，[1] int64。"""
        sizes = emit("Shape", [self.counts], "mla/chosen_BS", np.int64, [2], start=0, end=2)
        # 多出来的收下 -1 与 T 之外的；一列就够，多到 ks 列是因为 TensorRT 要求 indices 不比被写的宽。
        slots = emit("Shape", [self.indices], "mla/slots", np.int64, [1], start=2, end=3)
        columns = emit("Add", [keys, slots], "mla/chosen_columns", np.int64, [1])
        shape = emit("Concat", [sizes, columns], "mla/chosen_shape", np.int64, [3], axis=0)
        places = emit("Cast", [self.indices], "mla/places", np.int64, to=onnx.TensorProto.INT64)
        inside = emit("GreaterOrEqual", [places, emit.int0d(0)], "mla/places_inside", np.bool_)
        below = emit("Less", [places, keys], "mla/places_below", np.bool_)
        inside = emit("And", [inside, below], "mla/places_within", np.bool_)
        places = emit("Where", [inside, places, keys], "mla/chosen_places", np.int64)
        zeros = emit("Expand", [emit.float0d(0.0), shape], "mla/chosen_none", np.float32)
        places_shape = emit("Shape", [places], "mla/places_shape", np.int64, [3])
        ones = emit("Expand", [emit.float0d(1.0), places_shape], "mla/chosen_ones", np.float32)
        flags = emit("ScatterElements", [zeros, places, ones], "mla/chosen_flags", np.float32, axis=2)
        flags = emit("Slice", [flags, emit.ints(0), keys, emit.ints(2)], "mla/chosen_keys", np.float32)
        chosen = emit("Greater", [flags, emit.float0d(0.0)], "mla/chosen_3d", np.bool_)
        return emit("Unsqueeze", [chosen, emit.ints(1)], "mla/chosen", np.bool_)
