"""EdgeShard's strategies: the exact planner, its published algorithms, and simple baselines."""
