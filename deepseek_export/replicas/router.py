"""Ray Serve 的路由：一个请求交给哪个副本。只由 Ray Serve 按名字导入。"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deepseek_export.serving.http.affinity import Hint, choose


class PrefixRouter(RequestRouter):
    """同样开头的去同一个副本，那个满了就随便取两个挑短的，见 :func:`~deepseek_export.serving.http.affinity.choose`。"""

    def initialize_state(self, **options: Any) -> None:
        """``full``：一个副本手上有这么多个请求就算满了。"""
        self._full: int = options["full"]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """请求的第一个参数是 :class:`Hint`。"""
        hint = Hint()
        if pending_request is not None:
            # 不说这个，都不收的时候 Ray Serve 不停地重选，不歇。
            pending_request.routing_context.should_backoff = True
            hint = next((one for one in pending_request.args if isinstance(one, Hint)), hint)
        names = {str(one.replica_id.unique_id): one for one in candidate_replicas}
        return choose(hint, names, self._is_full)

    def _is_full(self, replica: RunningReplica) -> bool:
        waiting = self.replica_queue_len_cache.get(replica.replica_id)
        return waiting is not None and waiting >= self._full
