"""几个副本：同一个模型各起一份，放在 Ray 上，做批量，或一起答 HTTP。

- :mod:`.replica`：一个副本：模型、引擎与它的 HTTP 应用；向 Ray 要什么；
- :mod:`.pool`：批量用的一池 actor，死了的重起；
- :mod:`.deployment`：Ray Serve 上的：入口与副本；:mod:`.router`：同样开头的请求去同一个副本；
- :mod:`.service`：把它们起起来，看着，停下。

每个副本有自己的引擎；模型切开了的，还有自己的一套 stage。
"""
