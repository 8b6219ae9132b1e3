"""`python -m btx_operator.cluster`: the operator. Exits 0 after SIGTERM, 78 if it cannot begin."""

import asyncio
import json
import logging
import signal
import sys
import time

from btx_operator.cluster import memory, settings
from btx_operator.cluster.controller import Controller, Stopped
from btx_operator.cluster.kube import ApiError, connect
from btx_operator.cluster.meters import Meters
from btx_operator.cluster.settings import Settings
from btx_operator.errors import UserError


class _Json(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        time_ = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{time_}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _log(found: Settings) -> None:
    handler = logging.StreamHandler(sys.stdout)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_Json() if found.log_json else plain)
    logging.basicConfig(level=found.log_level, handlers=[handler])
    # kopf tells of every event.
    for noisy in ("kopf", "aiohttp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


async def _main(found: Settings) -> int:
    meters = Meters()
    kube = await connect(requests=found.requests, observer=meters.request)
    work = asyncio.create_task(Controller(kube, found, meters).run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        return 0
    except BaseExceptionGroup as group:
        _, errors = group.split(Stopped)
        for error in errors.exceptions if errors else ():
            logging.getLogger(__name__).error("ended: %r", error)
        return 1 if errors else 0
    finally:
        await kube.close()
    return 0


def main() -> int:
    """Reads the settings, connects, works until it is told to end."""
    memory.set_up()
    try:
        found = settings.read()
        _log(found)
        return asyncio.run(_main(found))
    except (UserError, ApiError) as error:
        print(f"btx-operator: {error}", file=sys.stderr)
        return 78


if __name__ == "__main__":
    sys.exit(main())
