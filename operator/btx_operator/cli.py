"""`btx`: the engine on this machine. plan, run, status, report, export, retry, refresh, gc.

What needs storage is asked of a trainer process (an errand); this side knows no storage. Exit
codes: 0 all is well, 2 usage or manifest, 128 + signal when stopped, else that of the trainer's
contract (btx_api.stage.Exit).
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from btx_api.methods import graph
from btx_api.names import RUNS_FOLDER, STAGES_FOLDER
from btx_api.spec import Model, Storage, explain
from btx_api.stage import (
    Exit,
    Export,
    Gc,
    Kind,
    Preflight,
    Problem,
    Progress,
    Report,
    ReportRun,
    Result,
    Task,
    TaskExecution,
)
from btx_api.status import ConditionType, EventReason, Reason, State, Status
from pydantic import ValidationError

from btx_operator import manifest, processes, views
from btx_operator.edits import standing
from btx_operator.errors import ErrandError, ManifestError, NotFoundError, UserError
from btx_operator.flops import Rate, measured_rates
from btx_operator.local import (
    LocalBackend,
    SavedRun,
    annotate,
    exit_code,
    run_folder,
    saved,
    saved_runs,
)
from btx_operator.manifest import RunManifest
from btx_operator.observed import Event, storage_key
from btx_operator.render import Screen

TOLD = (
    EventReason.ATTEMPT_FAILED, EventReason.ATTEMPT_LOST, EventReason.ARTIFACT_CORRUPT,
    EventReason.MEMBERS_DECIDED, EventReason.EXPERT_DEAD, EventReason.EXPERT_ALIVE,
)  # fmt: skip
"""Events worth a line; the rest is seen in the stages' states, or said at the end."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SUMMARY = "summary.txt"
"""Written by the report errand beside report.html."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the `btx` command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.command(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        for line in str(error).splitlines():
            print(f"btx: {line}", file=sys.stderr)
        return error.exit
    except BrokenPipeError:  # `btx status | head`: nobody reads what Python flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a run's own folder, an output folder, a full disk
        print(f"btx: {error.filename or 'btx'}: {error.strerror or error}", file=sys.stderr)
        return Exit.FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _rate(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="btx", description=(__doc__ or "").splitlines()[0])
    top.add_argument("--version", action="version", version=f"btx {version('btx')}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(function: Any, usage: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(function.__name__, help=usage, description=usage)
        parser.set_defaults(command=function)
        parser.add_argument(
            "--dir", type=Path, default=Path(".btx"), help="state of this machine's runs (.btx)"
        )
        return parser

    def files(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
        parser.add_argument(
            "--set", action="append", default=[], metavar="PATH=VALUE",
            help="sets a field of every manifest first: experts[0].tokens=10K",
        )  # fmt: skip

    def remote(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "-n", "--namespace", metavar="NAME", help="a run of the cluster, in this namespace"
        )
        parser.add_argument("--context", metavar="NAME", help="of the kubeconfig; a cluster's run")

    parser = command(plan, "what a run would do and cost, without doing it")
    files(parser)
    remote(parser)
    parser.add_argument(
        "--flops-per-second", type=_rate, metavar="RATE",
        help="what one GPU achieves, such as 400e12; else as measured in runs of this machine",
    )  # fmt: skip
    parser = command(run, "runs manifests side by side; run again to resume")
    files(parser)
    parser.add_argument("--verify", action="store_true", help="read every byte of what is reused")
    parser.add_argument("--slots", type=_whole, metavar="N", help="stages at once (the cores)")
    parser = command(status, "runs of this machine or of a cluster, or the stages of one")
    parser.add_argument("run", nargs="?")
    remote(parser)
    parser = command(report, "runs side by side: tables, report.html, report.json")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser = command(export, "copies a model out of the storage, every byte verified")
    parser.add_argument("run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", default="", help="finetune, mix, average, train-NAME (the last)")
    for function, usage in (
        (retry, "forgives the failures so far"), (refresh, "looks at the inputs again"),
    ):  # fmt: skip
        parser = command(function, usage)
        parser.add_argument("run")
        remote(parser)
    parser = command(gc, "deletes what no run wants: none at work, none that ended lately")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", type=Path, metavar="FILE")
    what.add_argument("--storage", metavar="URI")
    parser.add_argument("--keep-days", type=_whole, required=True, metavar="N")
    parser.add_argument(
        "--abandoned-days", type=_whole, metavar="N",
        help="gives up runs that are not done and of which nothing moved for so long (never)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="also where no run has a record")
    parser.add_argument("--dry-run", action="store_true", help="only says what would be deleted")
    return top


def _manifests(args: argparse.Namespace) -> list[RunManifest]:
    """All files of a command line, every problem of all of them at once."""
    found: list[RunManifest] = []
    problems: list[str] = []
    for path in args.files:
        try:
            found.append(manifest.read(path, args.set))
        except ManifestError as error:
            problems += error.problems
    names = [item.name for item in found]
    problems += [
        f"metadata.name: {name!r} is the name of {names.count(name)} of the runs"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise ManifestError(*problems)
    for item in found:
        if item.unread:
            print(f"note: {item.name}: only a cluster reads {', '.join(item.unread)}")
    return found


def _errand(storage: Storage, name: str, *, echo: tuple[str, ...] = (), **work: Model) -> Result:
    """Asks a trainer process; ErrandError with its one line when there is no answer.

    `echo`: lines of its log that begin so are printed.
    """
    with tempfile.TemporaryDirectory(prefix="btx-") as folder:
        task = Task(execution=TaskExecution(storage=storage, name=name), **work)  # type: ignore[arg-type]  # one of the five
        code, result, log = asyncio.run(processes.run_task(task, folder=Path(folder)))
        lines = log.read_text(errors="replace").splitlines()
        print("".join(f"{line}\n" for line in lines if line.startswith(echo)), end="")
        if code == Exit.OK and result is not None:
            return result
        if result is not None and result.problem is not None:
            what = _words(result.problem)
        else:
            last = " ".join(lines[-1:])
            what = f"{name}: the trainer's process ended with {code}: {last}"
    raise ErrandError(what, code or Exit.FAILED)


def _words(problem: Problem) -> str:
    return f"{problem.field}: {problem.message}" if problem.field else problem.message


def plan(args: argparse.Namespace) -> int:
    """`btx plan FILE...`, or of runs of a cluster: `btx plan -n NAMESPACE RUN...`"""
    if cluster := _cluster(args):
        return _plan_remote(args, cluster)
    planned: dict[tuple[str, str], dict[str, str]] = {}
    refused, manifests, rates = False, _manifests(args), _rates(args)
    for item in manifests:
        uid, members = "", None
        with suppress(NotFoundError):
            before = saved(args.dir, item.name)
            uid, members = before.uid, standing(item.spec, before.status)
        ask = Preflight(
            spec=item.spec, uid=uid, members=members.experts if members else None,
            without=members.without if members else (), record=False,
        )  # fmt: skip
        resolved = _errand(item.spec.storage, "preflight", preflight=ask).resolved
        assert resolved is not None, "a preflight that ends well has an answer"
        print(f"{item.name}: {item.spec.method}, storage {item.spec.storage.uri}")
        for problem in resolved.problems:
            refused = True
            print(f"btx: {item.name}: {problem}", file=sys.stderr)
        if resolved.problems:
            continue
        stages = graph(item.spec, resolved, members, uid=uid)
        # Only runs over the same storage share what they make.
        elsewhere = planned.setdefault(storage_key(item.spec), {})
        bits = int(resolved.complete or "0", 16)
        complete = [bool(bits >> i & 1) for i in range(len(stages))]
        for line in views.plan_tables(
            item.spec, stages, complete, resolved.parameters, rates=rates, elsewhere=elsewhere
        ):
            print(f"  {line}")
        for node in stages.values():
            elsewhere.setdefault(node.stage.digest, item.name)
    return Exit.CONFIGURATION if refused else Exit.OK


def _plan_remote(args: argparse.Namespace, cluster: Any) -> int:
    """What the operator found out about each run when it accepted it; needs no storage."""
    rates, refused = _rates(args, cluster.runs()), False
    for path in args.files:
        one = cluster.run(str(path))
        print(f"{one.name}: {one.spec.method}, storage {one.spec.storage.uri}")
        if one.status.resolved is None or one.status.release is None:
            refused = True
            why = views.reasons(one.status) or ["its inputs have not been looked at yet"]
            print("\n".join(f"btx: {one.name}: {line}" for line in why), file=sys.stderr)
            continue
        print("\n".join(f"  {line}" for line in views.plan_of(one, one.uid, rates)))
    return Exit.CONFIGURATION if refused else Exit.OK


def _cluster(args: argparse.Namespace) -> Any:
    """The cluster that is asked for; None for this machine."""
    if args.namespace is None and args.context is None:
        return None
    try:
        from btx_operator.cluster.remote import Remote  # noqa: PLC0415 - an extra, and slow
    except ModuleNotFoundError as error:
        raise UserError(f"a cluster's runs need btx[operator]: no {error.name}") from None
    return Remote(args.namespace, args.context)


def _rates(args: argparse.Namespace, past: Sequence[SavedRun] | None = None) -> dict[Kind, Rate]:
    """As stated, or as measured in past runs (this machine's); the unreadable tell nothing."""
    if args.flops_per_second is not None:
        stated = Rate(flops_per_second=args.flops_per_second, source="--flops-per-second, one GPU")
        return dict.fromkeys(Kind, stated)
    if past is None:
        past = []
        for name in saved_runs(args.dir):
            with suppress(UserError):
                past.append(saved(args.dir, name))
    return measured_rates(past)


def run(args: argparse.Namespace) -> int:
    """`btx run FILE...`"""
    manifests = _manifests(args)
    screen = Screen(stream=sys.stdout, clock=time.monotonic)

    def tell(name: str, event: Event) -> None:
        if event.reason in TOLD:
            screen.say(f"{name}: {event.message}")

    backend = LocalBackend(args.dir, slots=args.slots, on_event=tell)
    try:
        for item in manifests:
            backend.open(item.name, item.spec, verify=args.verify)
        stopped_by = asyncio.run(_drive(backend, [item.name for item in manifests], screen))
        codes = [_finish(args, backend, item) for item in manifests]
    finally:
        backend.close()
    if any(codes) and stopped_by:
        print("stopped; `btx run` again goes on from the checkpoints")
        return 128 + stopped_by
    return next(filter(None, codes), Exit.OK)


async def _drive(backend: LocalBackend, names: Sequence[str], screen: Screen) -> int:
    """Works until every run is settled; returns the signal that stopped it, or 0."""
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        again = "stopping at a checkpoint; once more to kill"
        screen.say(again if len(received) == 1 else "killing")
        backend.interrupt()

    def show() -> None:
        screen.show([
            line
            for name in names
            for line in views.stage_lines(name, backend.status(name), backend.progress(name))
        ])  # fmt: skip

    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup, or a background job: the caller does not want it heard
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    await backend.run_until_done(tick=show)
    return received[0] if received else 0


def _finish(args: argparse.Namespace, backend: LocalBackend, item: RunManifest) -> int:
    """Says how one run ended and where things are; returns its exit code."""
    name, now = item.name, backend.status(item.name)
    print(f"\n{name}: {now.state}")
    for reason in views.reasons(now):
        if reason != Reason.INTERRUPTED:
            print(f"btx: {name}: {reason}", file=sys.stderr)
    for row in now.stages:
        if row.state is State.FAILED:
            log, result, _ = processes.files(run_folder(args.dir, name), row.name, row.attempt)
            left = processes.read_result(result)
            # A row's message is cut to fit a status.
            why = _words(left.problem) if left and left.problem else row.message
            print(f"btx: {name}/{row.name}: {why} (log {log})", file=sys.stderr)
    accepted, succeeded = map(now.condition, (ConditionType.ACCEPTED, ConditionType.SUCCEEDED))
    if accepted is None or accepted.status != "True":
        return exit_code(now)  # the model and report that are there are of another spec
    if now.model:
        print(f"  model   {now.model}")
    if succeeded and succeeded.status == "True":
        _report(item.spec.storage, {name: now}, run_folder(args.dir, name) / "report")
    return exit_code(now)


def status(args: argparse.Namespace) -> int:
    """`btx status [RUN]`"""
    if cluster := _cluster(args):
        if args.run is None:
            lines = views.runs_table(cluster.runs())
        else:
            lines = views.run_tables(cluster.run(args.run), {})
    elif args.run is None:
        lines = views.runs_table([saved(args.dir, name) for name in saved_runs(args.dir)])
    else:
        one = saved(args.dir, args.run)
        lines = views.run_tables(one, asyncio.run(_progress(args.dir, one)) if one.pid else {})
    print("\n".join(lines))
    return Exit.OK


async def _progress(root: Path, one: SavedRun) -> dict[str, Progress]:
    """Asks the trainers of a run that another process works on."""
    found = {}
    for row in one.status.stages:
        if row.state is State.RUNNING:
            task_file = processes.files(run_folder(root, one.name), row.name, row.attempt)[2]
            port = processes.port_of(task_file)
            found[row.name] = await processes.pull(port) if port else None
    return {name: progress for name, progress in found.items() if progress}


def report(args: argparse.Namespace) -> int:
    """`btx report RUN...`"""
    runs = [saved(args.dir, name) for name in args.runs]
    first = runs[0].spec.storage
    for other in runs[1:]:
        if other.spec.storage != first:
            raise UserError(
                f"run {other.name!r}: its storage {other.spec.storage.uri} is not {first.uri} of "
                f"{runs[0].name!r}"
            )
    folder = run_folder(args.dir, runs[0].name) if len(runs) == 1 else args.dir
    _report(first, {item.name: item.status for item in runs}, args.out or folder / "report")
    return Exit.OK


def _report(storage: Storage, runs: dict[str, Status], folder: Path) -> None:
    """Has the report made in a folder and prints its summary."""
    wanted = []
    for name, now in runs.items():
        row = now.row("evaluate")
        if row is None or row.state is not State.COMPLETE:
            raise UserError(f"run {name!r}: its evaluation is not complete ({now.state})")
        wanted.append(ReportRun(name=name, digest=row.digest))
    _errand(storage, "report", report=Report(runs=tuple(wanted), folder=str(folder)))
    print(f"  report  {folder / 'report.html'}\n")
    print((folder / SUMMARY).read_text(encoding="utf-8").rstrip())


def export(args: argparse.Namespace) -> int:
    """`btx export RUN FOLDER`"""
    one = _saved_with_stages(args)
    row = views.final_stage(one.status, args.stage)
    if row is None:
        known = ", ".join(row.name for row in one.status.stages)
        raise UserError(f"run {one.name!r}: no stage {args.stage!r} (stages: {known})")
    if row.state is not State.COMPLETE:
        raise UserError(f"{one.name}/{row.name}: is {row.state}, not Complete")
    # The card is the final model's; it is written when that is measured.
    final = row is views.final_stage(one.status)
    measured = one.status.row("evaluate") if final else None
    card = measured.digest if measured and measured.state is State.COMPLETE else ""
    ask = Export(kind=row.kind, digest=row.digest, folder=str(args.folder), card=card)
    _errand(one.spec.storage, "export", export=ask)
    more = " with its model card" if card else ""
    print(f"{one.name}/{row.name}: exported to {args.folder}{more}")
    return Exit.OK


def _saved_with_stages(args: argparse.Namespace) -> SavedRun:
    one = saved(args.dir, args.run)
    if not one.status.stages:
        raise UserError(f"run {one.name!r}: has no stages yet ({one.status.state})")
    return one


def retry(args: argparse.Namespace) -> int:
    """`btx retry RUN`"""
    return _annotate(args, "its failures are forgiven", retry=True)


def refresh(args: argparse.Namespace) -> int:
    """`btx refresh RUN`"""
    return _annotate(args, "its inputs will be looked at again", refresh=True)


def _annotate(args: argparse.Namespace, what: str, **wish: bool) -> int:
    if cluster := _cluster(args):
        cluster.annotate(args.run, **wish)
        print(f"{args.run}: {what} by the operator")
        return Exit.OK
    annotate(args.dir, args.run, **wish)
    pid = saved(args.dir, args.run).pid
    when = f"by the running process {pid}" if pid else "at the next `btx run`"
    print(f"{args.run}: {what} {when}")
    return Exit.OK


def gc(args: argparse.Namespace) -> int:
    """`btx gc FILE|--storage URI --keep-days N`"""
    if args.file:
        storage = manifest.read(args.file).spec.storage
    else:
        try:
            storage = Storage.parse({"uri": args.storage})
        except ValidationError as error:
            raise ManifestError(*explain(error, "--storage")) from None
    ask = Gc(
        keep_days=args.keep_days, dry_run=args.dry_run, abandoned_days=args.abandoned_days,
        force=args.force,
    )  # fmt: skip
    print(_errand(storage, "gc", echo=(STAGES_FOLDER, RUNS_FOLDER), gc=ask).text)
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
