"""The engine as a process: its threads, its line to the daemon, what the compute thread is handed and in what order."""
