"""How fast this device computes: products, and every kind of layer of a model."""
