"""How the devices of a household know and reach each other; the rest of the daemon sees only `Network`."""

from peerllm.daemon.network.network import Network
from peerllm.daemon.network.peer import Peer, Sighting
from peerllm.daemon.network.speed.link_tables import LinkFigure

__all__ = ["LinkFigure", "Network", "Peer", "Sighting"]
