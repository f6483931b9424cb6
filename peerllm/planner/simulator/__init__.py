"""A plan run as discrete events, with queues and resources instead of a closed formula."""
