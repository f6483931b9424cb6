"""Who goes on with a deployment whose coordinator is lost, and who gives way when two coordinate it."""
