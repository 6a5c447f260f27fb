"""TensorRT：两种发行的差别、插件、建引擎、引擎的记录。

本包的 ``__init__`` 不导入 TensorRT、torch，``dsx doctor`` 只用到 ``flavour`` 与 ``plugins``。
"""
