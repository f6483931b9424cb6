"""How a coordinator finds the next plan of a deployment: who could take part, how fast, and whether to move."""
