"""Who belongs here: `peerllm invite` and `join`, leaving, putting out a lost device, and tokens of persons."""

from __future__ import annotations

import argparse
import json
import time

from peerllm.cli.device import LocalDevice
from peerllm.cli.exactness import UsageError
from peerllm.cli.terminal import printable, table
from peerllm.daemon.settings import PAIRING_PORT

TOKENS = "/peerllm/v1/tokens"
MAX_HOSTS = 2  # a device with many interfaces would fill the screen


def invite(args: argparse.Namespace) -> None:
    """Prints how to use the code, and the code as the last word."""
    answer = LocalDevice(args.data).post("/peerllm/v1/invite", {})
    if args.json:
        print(json.dumps({key: answer[key] for key in ("code", "port", "hosts", "expires_s")}))
        return
    print("On the other device, start peerllm and type, within", answer["expires_s"], "seconds:")
    print(f"  peerllm join {answer['code']}")
    print("If it does not find this device by itself:")
    for host in answer["hosts"][:MAX_HOSTS] or ["ADDRESS"]:
        print(f"  peerllm join {answer['code']} --at {printable(_place(host, answer['port']))}")
    print("Code:", answer["code"])


def _place(host: str, port: int) -> str:
    """As --at takes it; the usual port goes without saying."""
    if port == PAIRING_PORT:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def join(args: argparse.Namespace) -> None:
    body = {"code": args.code}
    if args.at is not None:
        host, port = args.at
        body["at"] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    name = LocalDevice(args.data).post("/peerllm/v1/join", body)["name"]
    print(f"Joined the household of {printable(str(name))}.")


def leave(args: argparse.Namespace) -> None:
    LocalDevice(args.data).post("/peerllm/v1/leave", {})
    print("Left the household.")


def remove(args: argparse.Namespace) -> None:
    LocalDevice(args.data).post("/peerllm/v1/remove", {"device": args.device})
    print(f"{printable(args.device)} is no longer of this household; its links are cut. It comes back by pairing only.")


def token(args: argparse.Namespace) -> None:
    if bool(args.person) == (args.doing == "list"):
        raise UsageError(f"token {args.doing} takes {'no' if args.person else 'a'} PERSON")
    {"add": _add, "list": _list, "revoke": _revoke}[args.doing](args)


def _add(args: argparse.Namespace) -> None:
    """The token is the last word."""
    answer = LocalDevice(args.data).post(TOKENS, {"person": args.person})
    if args.json:
        print(json.dumps({key: answer[key] for key in ("person", "token")}))
        return
    print(f"Whoever asks this device with it is {printable(answer['person'])}. It is shown this once.")
    print("Token:", answer["token"])


def _list(args: argparse.Namespace) -> None:
    found = LocalDevice(args.data).get(TOKENS)["tokens"]
    if args.json:
        print(json.dumps(found))
        return
    made = [(one["person"], time.strftime("%Y-%m-%d", time.localtime(one["created"]))) for one in found]
    print(table([("person", "since"), *made]) if made else "Nobody has a token; make one: peerllm token add PERSON")


def _revoke(args: argparse.Namespace) -> None:
    LocalDevice(args.data).post(f"{TOKENS}/revoke", {"person": args.person})
    print(f"The token of {printable(args.person)} opens nothing any more.")
