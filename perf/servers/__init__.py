"""服务的测量：被比的服务与引擎（:mod:`.contenders`），闭环的客户端（:mod:`.load`），人造的词表（:mod:`.words`）。"""
