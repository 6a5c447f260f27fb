"""同类引擎（transformers、llama.cpp）与 dsx 并排地测：同一份权重、同样的线程数与 token，套件在 ``perf/suites/peers.py``。"""
