"""在一张 NVIDIA 卡上核对并测量插件的 kernel：``python -m perf.gpu.accept``，套件 ``gpu`` 也用它。"""
