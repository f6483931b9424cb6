"""`peerllm service`: this device as a service of systemd, so that a machine that boots is back in its household."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from peerllm.cli.device import running_pid
from peerllm.cli.exactness import UsageError
from peerllm.cli.service.service_manager import ServiceManager, bus_knows_user, lingers
from peerllm.cli.service.unit_files import SYSTEM_DATA, UNIT, UnitFiles, check_readable
from peerllm.cli.terminal import printable, tell
from peerllm.errors import BadInputError, RefusedError


def install(args: argparse.Namespace) -> None:
    """Idempotent: what is as it should be stays, and a service that was changed is started anew."""
    from peerllm.cli.parser import build_parser

    chosen = build_parser().parse_args(["up", *args.options])  # exits with 2 where one of them is wrong
    if args.system and any(one.split("=")[0] == "--data" for one in args.options):
        raise UsageError(f"the system's service keeps its data in {SYSTEM_DATA}: leave out --data")
    manager, files = ServiceManager(args.system), UnitFiles.of(args.system)
    if args.system:
        check_readable()
    data = SYSTEM_DATA if args.system else chosen.data
    state = manager.shown()
    pid = running_pid(data)
    if pid is not None and str(pid) != state.get("MainPID"):
        raise RefusedError(
            f"a device runs on {data} already (process {pid}), which is no service; stop it first: kill {pid}"
        )
    try:
        done = files.write(files.wanted(args.options, args.with_))
    except PermissionError as error:
        raise _needs_root(error) from error
    if done:
        manager.run("daemon-reload")
    if state.get("UnitFileState") != "enabled":
        manager.run("enable", UNIT)
        done.append(f"enabled it: {_starts(args.system)}")
    if done or state.get("ActiveState") != "active":
        tell("Starting it; the first time it measures this machine, which takes up to half a minute.")
        manager.run("restart", UNIT)
        done.append("started it")
    for line in done or ["It is installed and runs already; nothing was changed."]:
        print(printable(line))
    print(f"Its data: {data}" + (f"   (so: sudo peerllm status --data {data})" if args.system else ""))
    if not args.system and not lingers():
        print("To start it with the machine, before anybody logs in, type: loginctl enable-linger")
    if args.system and not bus_knows_user():
        print("To hand over before the machine sleeps it needs a user that the bus knows; make one with:")
        print("  sudo sh -c 'systemctl stop peerllm; useradd --system peerllm; systemctl start peerllm'")


def uninstall(args: argparse.Namespace) -> None:
    """Takes away what install made and nothing else; data stay."""
    manager, files = ServiceManager(args.system), UnitFiles.of(args.system)
    written = files.written()
    if files.unit not in written:
        there = f"; {files.unit} was put there by somebody else" if files.unit.exists() else ""
        others = " --system" if not args.system and UnitFiles.of(True).written() else ""
        hint = f"; the system has one: peerllm service uninstall{others}" if others else ""
        print(f"No service was installed{there}{hint}.")
        return
    try:
        manager.run("disable", "--now", UNIT)
        done = ["stopped and disabled it", *files.remove(written)]
    except PermissionError as error:
        raise _needs_root(error) from error
    manager.run("daemon-reload")
    if manager.shown().get("ActiveState") == "failed":
        manager.run("reset-failed", UNIT)
    for line in done:
        print(printable(line))
    print(f"Its data stay: {SYSTEM_DATA}" if args.system else "Its data stay.")


def status(args: argparse.Namespace) -> None:
    manager, files = ServiceManager(args.system), UnitFiles.of(args.system)
    state = manager.shown()
    found: dict[str, Any] = {
        "scope": "system" if args.system else "user",
        "installed": files.unit in files.written(),
        "unit": str(files.unit) if files.unit.exists() else None,
        "drop_ins": sorted(path.stem for path in files.drop_ins.glob("*.conf")),
        "enabled": state.get("UnitFileState") == "enabled",
        "state": state.get("ActiveState", ""),
        "detail": state.get("SubState", ""),
        "pid": int(state.get("MainPID", "0")) or None,
        "restarts": int(state.get("NRestarts", "0") or 0),
        "starts_without_login": state.get("UnitFileState") == "enabled" and (args.system or lingers()),
    }
    if args.json:
        print(json.dumps(found))
        return
    option = " --system" if args.system else ""
    if found["unit"] is None:
        print(f"No service is installed; install one with: peerllm service install{option}")
        return
    starts = _starts(args.system)
    drop_ins = f" with {', '.join(found['drop_ins'])}" if found["drop_ins"] else ""
    starts = starts if found["enabled"] else "not enabled"
    print(f"{found['unit']}{drop_ins}: {found['state']} ({found['detail']}), {starts}")
    if found["pid"]:
        again = f", started again {found['restarts']} times" if found["restarts"] else ""
        print(f"process {found['pid']}{again}; its log: {manager.journal}")
    else:
        print(f"Why it does not run: {manager.journal}")
    if not args.system and not found["starts_without_login"]:
        print("To start it with the machine, before anybody logs in, type: loginctl enable-linger")


def _starts(system: bool) -> str:
    return "starts with the machine" if system or lingers() else "starts when you log in"


def _needs_root(error: PermissionError) -> BadInputError:
    who = "" if os.geteuid() else " even for root"
    return BadInputError(f"{Path(str(error.filename))} cannot be changed{who}; type the same behind sudo")
