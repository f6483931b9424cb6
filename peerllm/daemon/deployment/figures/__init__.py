"""What people are told of deployments: how far they are, how fast, what every device does when."""
