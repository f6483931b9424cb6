"""What this device loads of deployments: their epochs, the weights that are fetched for them, the shards they share."""
