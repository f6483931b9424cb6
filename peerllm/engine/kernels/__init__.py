"""What computes beside the graphs: rounded products that torch calls, and the accelerator that it drives."""
