"""The one cost model: what layers, hops, plans and working space cost."""
