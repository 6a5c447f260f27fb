"""一台放不下的模型：一套 stage 连成流水线，合起来又是一个 ``Runner``，会话、生成、服务都不知道。

- :mod:`.wire`：帧与信道；:mod:`.messages`：帧里说什么；
- :mod:`.stage`：stage 进程；:mod:`.local`：在本机上起它们；
- :mod:`.gang`：一整套进程与它们连成的环，看着它们，断了就重起；
- :mod:`.runner`、:mod:`.caches`、:mod:`.backend`：后端的四样约定。

消息沿着环走：发起的一端 → 第一个 stage → …… → 最后一个 → 发起的一端。只有一条路、先进先出，所以算一步与存取缓存的先后在每个 stage 上都一样。
"""
