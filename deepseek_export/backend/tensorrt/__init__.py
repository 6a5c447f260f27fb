"""``dsx build`` 为当前 GPU 建的 TensorRT 引擎。

本包的 ``__init__`` 什么也不导入：``cuda`` 与 ``replay`` 在没有装 dsx 其余依赖的机器上也用得了（``perf/gpu``）。
"""
