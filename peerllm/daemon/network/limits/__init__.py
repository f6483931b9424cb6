"""How large each control message may be, and how much of this device one other may keep busy."""
