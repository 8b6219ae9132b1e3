"""The Kubernetes API as the operator uses it: dicts in and out, one client, bounded concurrency.

The only module that imports `kubernetes`. Nothing is retried here: the work queue does that.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlencode
from urllib.request import getproxies_environment

from btx_api.names import API_VERSION, PLURAL
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

Object = dict[str, Any]
TIMEOUT = 30.0
"""Seconds for one request."""
PAGE = 100
"""Objects read at once: what is held beside the cache, and how long the loop stands still."""
UNPACKED = {"Accept-Encoding": "identity"}
"""Packing a list costs both sides more than the network that it spares."""
METHODS = {"create": "POST", "update": "PUT", "delete": "DELETE", "patch": "PATCH"}
"""By verb; all others are GET."""
TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource of the API."""

    prefix: str
    plural: str


RUNS = Resource(f"/apis/{API_VERSION}", PLURAL)
JOBS = Resource("/apis/batch/v1", "jobs")
PODS = Resource("/api/v1", "pods")
SERVICES = Resource("/api/v1", "services")
EVENTS = Resource("/api/v1", "events")


NO_CLUSTER = "NoCluster"
"""Reason of the ApiError where nothing says which cluster is meant."""


class ApiError(Exception):
    """The API server refused, or could not be reached (`status` 0)."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.reason, self.message = status, reason, message
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""

    @property
    def final(self) -> bool:
        """The request is wrong, and will be as wrong the next time."""
        return self.status in (400, 413, 422)


Observer = Callable[[str, str, str, float], None]
"""Told of each request: verb, resource, code, seconds."""


class Kube:
    """One connection pool to one API server."""

    def __init__(
        self,
        configuration: client.Configuration,
        *,
        requests: int = 32,
        observer: Observer = lambda verb, resource, code, seconds: None,
    ) -> None:
        configuration.retries = None
        configuration.connection_pool_maxsize = requests
        # Otherwise each request reads .netrc, in another thread.
        configuration.client_session_kwargs = {"trust_env": bool(getproxies_environment())}
        self.configuration = configuration
        self.observer = observer
        self._api = client.ApiClient(configuration)
        self._slots = asyncio.Semaphore(requests)

    async def close(self) -> None:
        """Closes the connections."""
        await self._api.close()

    async def pages(
        self, resource: Resource, namespace: str = "", selector: str = ""
    ) -> AsyncIterator[tuple[list[Object], int]]:
        """All objects at one moment, page by page, each with the resourceVersion of the whole."""
        query = {"limit": str(PAGE)} | ({"labelSelector": selector} if selector else {})
        while True:
            page = await self.request("list", resource, namespace, query=query)
            meta = page["metadata"]
            yield page.get("items") or [], int(meta["resourceVersion"])
            if not meta.get("continue"):
                return
            query["continue"] = meta["continue"]

    async def list(
        self, resource: Resource, namespace: str = "", selector: str = ""
    ) -> list[Object]:
        """All objects at one moment, where they are few."""
        return [
            item async for items, _ in self.pages(resource, namespace, selector) for item in items
        ]

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """One object."""
        return await self.request("get", resource, namespace, name)

    async def create(self, resource: Resource, namespace: str, body: Object) -> Object:
        """The stored object."""
        return await self.request("create", resource, namespace, body=body)

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str) -> None:
        """Deletes this very object and, in the background, what it owns; gone already is well."""
        options = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        try:
            await self.request("delete", resource, namespace, name, body=options)
        except ApiError as error:
            # 409: the name is another object's by now.
            if error.status not in (404, 409):
                raise

    async def replace_status(self, resource: Resource, namespace: str, body: Object) -> Object:
        """Writes `.status` if metadata.resourceVersion is still the stored one; else 409."""
        name = body["metadata"]["name"]
        return await self.request("update", resource, namespace, name, "status", body=body)

    async def annotate(self, resource: Resource, namespace: str, name: str, **notes: str) -> Object:
        """Sets annotations by a merge patch."""
        body = {"metadata": {"annotations": notes}}
        return await self.request("patch", resource, namespace, name, body=body)

    async def log(self, namespace: str, pod: str, container: str, lines: int) -> str:
        """The last lines that a container printed."""
        query = {"container": container, "tailLines": str(lines), "limitBytes": "16384"}
        path = _path(PODS, namespace, pod, "log") + "?" + urlencode(query)
        return (await self._send("get", PODS, path)).decode(errors="replace")

    async def request(
        self, verb: str, resource: Resource, namespace: str = "", *names: str,
        query: dict[str, str] | None = None, body: Object | None = None,
    ) -> Object:  # fmt: skip
        """One request for `names` (object, subresource); raises ApiError."""
        path = _path(resource, namespace, *names)
        if query:
            path += "?" + urlencode(query)
        data = await self._send(verb, resource, path, body)
        try:
            return cast(Object, json.loads(data))
        except ValueError:
            raise ApiError(0, "NotJSON", data[:100].decode(errors="replace")) from None

    async def _send(
        self, verb: str, resource: Resource, path: str, body: Object | None = None
    ) -> bytes:
        begun, code = time.monotonic(), "error"
        try:
            async with self._slots:
                code, data, headers = await self._once(verb, path, body)
        except asyncio.CancelledError:
            # kopf ends by cancelling all tasks of the loop that began after it, the resolver's too.
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            raise ApiError(0, "Cancelled", path) from None
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise ApiError(0, type(error).__name__, str(error)) from error
        except Exception as error:
            # aiohttp's errors, by another library's hand.
            if type(error).__module__.partition(".")[0] not in ("aiohttp", "kubernetes"):
                raise
            raise ApiError(0, type(error).__name__, str(error)) from error
        finally:
            self.observer(verb, resource.plural, code, time.monotonic() - begun)
        if not code.startswith("2"):
            raise _refusal(int(code), data, headers)
        return data

    async def _once(self, verb: str, path: str, body: Object | None) -> tuple[str, bytes, Any]:
        method = METHODS.get(verb, "GET")
        patch = "merge-patch+" if verb == "patch" else ""
        headers = {"Accept": "application/json", "Content-Type": f"application/{patch}json"}
        headers |= UNPACKED
        auth = ["BearerToken"]
        await self._api.update_params_for_auth(headers, [], auth, path, method, body)
        answer = await self._api.rest_client.request(
            method,
            self.configuration.host + path,
            headers=headers,
            body=body,
            _request_timeout=TIMEOUT,
        )
        return str(answer.status), await answer.read(), answer.headers


def _path(resource: Resource, namespace: str, *names: str) -> str:
    parts = ["namespaces", namespace] * bool(namespace) + [resource.plural, *filter(None, names)]
    return "/".join([resource.prefix, *map(quote, parts)])


def _refusal(code: int, data: bytes, headers: Any) -> ApiError:
    try:
        status = json.loads(data)
        reason, message = status.get("reason", ""), status.get("message", "")
    except (ValueError, AttributeError):
        reason, message = "", data[:200].decode(errors="replace")
    try:
        after = float(headers.get("Retry-After", 0))
    except ValueError:
        after = 0.0
    return ApiError(code, reason, message, after)


async def connect(
    *, context: str | None = None, requests: int = 32, observer: Observer | None = None
) -> Kube:
    """In a pod its service account, else the kubeconfig; ApiError when there is neither."""
    configuration = client.Configuration()
    try:
        if TOKEN.exists() and context is None:
            config.load_incluster_config(client_configuration=configuration)
        else:
            await config.load_kube_config(context=context, client_configuration=configuration)
    except (config.ConfigException, ApiException) as error:
        raise ApiError(0, NO_CLUSTER, str(error)) from error
    return Kube(
        configuration, requests=requests,
        observer=observer or (lambda verb, resource, code, seconds: None),
    )  # fmt: skip


def namespace_of(context: str | None = None) -> str:
    """The kubeconfig's namespace for a context; `default` where it names none."""
    contexts, active = config.list_kube_config_contexts()
    found = active if context is None else next(c for c in contexts if c["name"] == context)
    return str(found["context"].get("namespace") or "default")


def credentials(configuration: client.Configuration) -> dict[str, Any]:
    """What another client of this process needs to connect as this one does."""
    token = TOKEN.read_text().strip() if TOKEN.exists() else None
    bearer = configuration.api_key.get("BearerToken", "")
    return {
        "server": configuration.host,
        "ca_path": configuration.ssl_ca_cert,
        "insecure": not configuration.verify_ssl,
        "certificate_path": configuration.cert_file,
        "private_key_path": configuration.key_file,
        "token": token or bearer.removeprefix("Bearer ") or None,
    }
