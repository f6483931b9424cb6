"""What is predicted and what is measured: plans, runs and traces, in figures and charts."""
