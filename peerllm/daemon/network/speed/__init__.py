"""What the links of the household carry: measured, refined by use, put together."""
