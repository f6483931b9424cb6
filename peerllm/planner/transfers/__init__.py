"""What travels between the stages of a plan: prompts in chunks, activations exact or as int8."""
