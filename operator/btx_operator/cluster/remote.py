"""Runs of a cluster for the command line: read with the user's own rights, changed by annotation.

Called by cli.py where --namespace or --context is given.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

from btx_api.names import REFRESH_ANNOTATION, RETRY_ANNOTATION
from btx_api.stage import Exit

from btx_operator.cluster.kube import NO_CLUSTER, RUNS, ApiError, Kube, connect, namespace_of
from btx_operator.cluster.objects import RunObject
from btx_operator.errors import UserError
from btx_operator.local import SavedRun

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Remote:
    """One namespace of the cluster that a kubeconfig's context names."""

    namespace: str | None
    context: str | None

    def runs(self) -> list[SavedRun]:
        """All that can be read, by name."""

        async def ask(kube: Kube, namespace: str) -> list[dict[str, Any]]:
            return await kube.list(RUNS, namespace)

        found = [RunObject.of(item) for item in self._do(ask)]
        return [_saved(run) for run in found if run.spec is not None]

    def run(self, name: str) -> SavedRun:
        """One run; UserError when there is none, or its spec cannot be read."""
        found = RunObject.of(self._do(lambda kube, ns: kube.get(RUNS, ns, name)))
        if found.spec is None:
            raise UserError("\n".join(f"run {name!r}: {line}" for line in found.problems))
        return _saved(found)

    def annotate(self, name: str, *, refresh: bool = False, retry: bool = False) -> None:
        """`btx refresh`, `btx retry`: the operator sees it at once."""
        asked = {REFRESH_ANNOTATION: refresh, RETRY_ANNOTATION: retry}
        fresh = {key: uuid.uuid4().hex[:12] for key, wanted in asked.items() if wanted}
        self._do(lambda kube, namespace: kube.annotate(RUNS, namespace, name, **fresh))

    def _do(self, ask: Callable[[Kube, str], Awaitable[T]]) -> T:
        async def work() -> T:
            kube = await connect(context=self.context)
            try:
                return await ask(kube, self.namespace or namespace_of(self.context))
            finally:
                await kube.close()

        try:
            return asyncio.run(work())
        except ApiError as error:
            found = UserError(f"cluster: {error.message or error}")
            if 0 < error.status < HTTPStatus.INTERNAL_SERVER_ERROR or error.reason == NO_CLUSTER:
                raise found from None
            # Nothing that the user wrote is wrong.
            found.exit = Exit.FAILED
            raise found from None


def _saved(run: RunObject) -> SavedRun:
    assert run.spec is not None
    return SavedRun(
        name=run.key[1], uid=run.uid, generation=run.generation, created=run.created,
        spec=run.spec, status=run.status,
    )  # fmt: skip
