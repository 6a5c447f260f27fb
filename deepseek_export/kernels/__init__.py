"""插件背后的 Triton kernel。

- :mod:`~deepseek_export.kernels.latent_attention`、:mod:`~deepseek_export.kernels.index_topk`、:mod:`~deepseek_export.kernels.sparse_latent_attention`、
  :mod:`~deepseek_export.kernels.grouped_swiglu`、:mod:`~deepseek_export.kernels.quantized_swiglu`、:mod:`~deepseek_export.kernels.quantized_linear`：kernel 本身，需要 Triton；同名的 ``*_launch`` 是它们的启动表；
- :mod:`~deepseek_export.kernels.table`：启动表由什么组成，有哪些 SM；
- :mod:`~deepseek_export.kernels.compile`：提前编译；
- :mod:`~deepseek_export.kernels.program`：编译结果，插件序列化的就是它；
- :mod:`~deepseek_export.kernels.launcher`：在 CUDA 流上启动它，需要 GPU。

本包的 ``__init__`` 不导入 torch 与 Triton。编译不需要 GPU。
"""
