"""What mixes a token with those before it: attention, convolutions, recurrences; a file each."""
