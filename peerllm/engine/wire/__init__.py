"""What travels between the engines of two stages, as objects here and as frames there (docs/wire.md)."""
