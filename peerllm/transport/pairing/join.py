"""The joining side."""

from __future__ import annotations

import asyncio
import hmac
import ssl
from contextlib import suppress
from dataclasses import dataclass

from peerllm.errors import AuthenticationError, LinkError, PairingError
from peerllm.transport.identity import Identity, certificate_device, verify
from peerllm.transport.pairing.code import normalise
from peerllm.transport.pairing.pairing_messages import (
    PAIRING_VERSION,
    Challenge,
    Confirm,
    Introduction,
    JoinRequest,
    PairingChannel,
    PairingDone,
    Possession,
    Welcome,
)
from peerllm.transport.pairing.pake import Pake
from peerllm.transport.roster.entry import RosterEntry, check_entry, clean_name, sign_entry
from peerllm.transport.roster.roster import MAX_ENTRIES
from peerllm.transport.tls.contexts import knock_context, peer_certificate
from peerllm.types import DeviceId

JOIN_TIMEOUT_S = 30.0  # waiting for a turn at the door included


@dataclass(frozen=True, slots=True)
class JoinResult:
    """Who invited, and what to merge: its household's entries, ours among them, and our own for the inviter."""

    device: DeviceId
    name: str
    entries: tuple[RosterEntry, ...]


async def join(
    identity: Identity,
    name: str,
    code: str,
    host: str,
    port: int,
    *,
    counter: int = 0,
    timeout_s: float = JOIN_TIMEOUT_S,
) -> JoinResult:
    """Join the household whose door is at host:port; PairingError says why not. `counter` is the own roster's."""
    code, name = normalise(code), clean_name(name)
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port, ssl=knock_context(), server_hostname="peerllm")
            try:
                return await _knock(
                    identity, name, code, counter, PairingChannel(reader, writer), peer_certificate(writer)
                )
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
    except PairingError:  # which is an OSError, too
        raise
    except TimeoutError as error:
        raise PairingError(f"{host}:{port} did not answer within {timeout_s:g} s; try again") from error
    except ConnectionRefusedError as error:
        raise PairingError(f"no pairing window is open at {host}:{port}; run peerllm invite there") from error
    except ssl.SSLError as error:
        raise PairingError(f"{host}:{port} is not a pairing door") from error
    except (LinkError, OSError) as error:
        raise PairingError(f"pairing with {host}:{port} broke off: {error}") from error


async def _knock(
    identity: Identity, name: str, code: str, counter: int, channel: PairingChannel, inviter_der: bytes
) -> JoinResult:
    try:
        inviter_pem = ssl.DER_cert_to_PEM_cert(inviter_der)
        inviter = certificate_device(inviter_pem)
    except ValueError as error:
        raise PairingError("what answers there is not a peerllm device") from error
    if inviter == identity.device:
        raise PairingError("a device cannot be paired with itself")
    pake = await asyncio.to_thread(Pake, code, inviter, identity.device, False)
    hello = await channel.send(JoinRequest(PAIRING_VERSION, identity.certificate_pem, name, pake.share, counter))
    challenge, challenge_bytes = await channel.receive(Challenge)
    if challenge.version != PAIRING_VERSION:
        raise PairingError(f"pairing version {challenge.version} is not {PAIRING_VERSION}; update both devices")
    keys = await asyncio.to_thread(pake.finish, challenge.share, hello, challenge_bytes)
    await channel.send(Confirm(keys.joiner_proof))
    confirm, _ = await channel.receive(Confirm)
    if not hmac.compare_digest(confirm.proof.encode(), keys.inviter_proof.encode()):
        raise PairingError("the other device does not know the code; somebody may be in between: do not go on")
    channel.authenticate(send_key=keys.joiner_mac, receive_key=keys.inviter_mac)
    await channel.send(Possession(identity.sign(b"joiner" + keys.transcript)))
    welcome, _ = await channel.receive(Welcome)
    try:
        verify(inviter_pem, welcome.signature, b"inviter" + keys.transcript)
        if len(entries := welcome.entries) > MAX_ENTRIES:
            raise PairingError(f"a household of {len(entries)} entries; at most {MAX_ENTRIES} are taken")
        for entry in entries:
            check_entry(entry)
    except (ValueError, AuthenticationError) as error:
        raise PairingError(f"the inviting device's answer is false: {error}") from error
    if not any(entry.device == identity.device and entry.introducer == inviter for entry in entries):
        raise PairingError("the inviting device did not introduce this one")
    above = max(counter, *(entry.counter for entry in entries))
    ours = sign_entry(identity, inviter_pem, welcome.name, above + 1)
    await channel.send(Introduction(ours))
    await channel.receive(PairingDone)
    return JoinResult(inviter, ours.name, (*entries, ours))
