"""Whether to leave the running plan for another one, the cost of moving included."""
