"""What torch computes with: rounded matrix products, and accelerators."""
