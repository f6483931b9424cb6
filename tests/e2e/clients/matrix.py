"""The table in docs/clients.md, made of what the clients' tests run.

`python -m tests.e2e.clients.matrix --write docs/clients.md`
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.e2e.clients.asked import EVERY, Client
from tests.e2e.clients.libraries import LangChainOllama, LangChainOpenAI, Llm
from tests.e2e.clients.official import Anthropic, OpenAI
from tests.e2e.clients.ollamas import Continue, HomeAssistant, N8n, Ollama, OpenWebUI, Zed

CLIENTS: tuple[type[Client], ...] = (
    OpenAI, Ollama, Anthropic, Llm, LangChainOpenAI, LangChainOllama, HomeAssistant, OpenWebUI, Continue, Zed, N8n,
)  # fmt: skip
BEGIN, END = "<!-- cells -->\n", "<!-- end of cells -->"


def table() -> str:
    """A row for each thing that clients can do."""
    names = [client.name for client in CLIENTS]
    rows = [["", *names], ["---"] * (len(names) + 1)]
    rows += [[cell, *("yes" if cell in client.cells else "" for client in CLIENTS)] for cell in EVERY]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def written(page: str) -> str:
    """The page with the table as it is now."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    path = Path(sys.argv[sys.argv.index("--write") + 1])
    path.write_text(written(path.read_text()))
