"""The room that decides and supervises: discovery, membership, coordinator, worker, weights. Never imports torch."""
