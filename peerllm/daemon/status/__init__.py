"""What people look at: the status object, traces, the speed of a serving deployment."""
