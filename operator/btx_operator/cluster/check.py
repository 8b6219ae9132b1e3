"""`helm test`: python -m btx_operator.cluster.check URL. Whether an installation can work.

Asks the API server whether this service account may do all that the operator does, and the operator
whether it is ready. Prints a line for each answer; exits 1 if one is no.
"""

import asyncio
import sys
import time
import urllib.request
from collections.abc import Iterator

from btx_api.names import GROUP

from btx_operator.cluster import settings
from btx_operator.cluster.kube import ApiError, Kube, Resource, connect
from btx_operator.errors import UserError

RIGHTS: dict[tuple[str, str], tuple[str, ...]] = {
    (GROUP, "btxruns"): ("get", "list", "watch"),
    (GROUP, "btxruns/status"): ("update",),
    ("batch", "jobs"): ("get", "list", "watch", "create", "delete"),
    ("", "pods"): ("list", "watch"),
    ("", "pods/log"): ("get",),
    ("", "services"): ("create",),
    ("", "events"): ("create",),
}
"""By API group and resource: every verb that the operator uses, and no other."""
REVIEWS = Resource("/apis/authorization.k8s.io/v1", "selfsubjectaccessreviews")
READY_SECONDS = 60.0


def ready(url: str, seconds: float = READY_SECONDS) -> str:
    """Empty once the operator answers 200, else what it answered after so long."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + seconds
    while True:
        try:
            with opener.open(url, timeout=5):
                return ""
        except OSError as error:
            if time.monotonic() >= end:
                return str(error)
        time.sleep(1)


async def missing(kube: Kube, namespaces: tuple[str, ...]) -> list[str]:
    """`verb resource in namespace` for everything that is not allowed; no namespaces: in all."""
    wanted = list(_wanted(namespaces))
    answers = await asyncio.gather(
        *(kube.create(REVIEWS, "", {"spec": {"resourceAttributes": one}}) for one in wanted)
    )
    return [
        f"{one['verb']} {'/'.join(filter(None, (one['resource'], one.get('subresource'))))} "
        f"in {one.get('namespace', 'every namespace')}"
        for one, answer in zip(wanted, answers, strict=True)
        if not answer["status"].get("allowed")
    ]


def _wanted(namespaces: tuple[str, ...]) -> Iterator[dict[str, str]]:
    for namespace in namespaces or ("",):
        for (group, path), verbs in RIGHTS.items():
            resource, _, subresource = path.partition("/")
            named = {"namespace": namespace, "subresource": subresource}
            where = {"group": group, "resource": resource, **{k: v for k, v in named.items() if v}}
            yield from ({**where, "verb": verb} for verb in verbs)


async def _rights() -> list[str]:
    kube = await connect()
    try:
        return await missing(kube, settings.read().namespaces)
    finally:
        await kube.close()


def main(url: str) -> int:
    """Exit code."""
    try:
        lacking = asyncio.run(_rights())
    except (ApiError, UserError) as error:
        print(f"rights: {error}")
        return 1
    for right in lacking:
        print(f"rights: must not {right}")
    if not lacking:
        print("rights: all that the operator needs")
    trouble = ready(url)
    print(f"operator: {trouble or 'ready'}")
    return 1 if lacking or trouble else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
