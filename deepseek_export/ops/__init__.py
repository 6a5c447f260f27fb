"""``dsx::`` 算子：契约（:mod:`~deepseek_export.ops.table`）与 eager 参考实现（每个算子一个文件）。

本包的 ``__init__`` 不导入 torch，``dsx inspect``、``dsx doctor`` 只需要契约表。
"""
