"""A plan run as discrete events: queues and resources, never a closed formula (design §6)."""
