"""NVIDIA 卡上的核对与计时：套件 ``gpu`` 的实现，也能单独以 ``python -m perf.gpu`` 启动。"""
