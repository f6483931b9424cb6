"""Routes through the devices, shared by both objectives: their graph, Lagrangian bounds, local search."""
