"""The tools that homes use, unchanged, against the demo: what each can do is a cell of docs/clients.md."""
