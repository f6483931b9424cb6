"""docs/clients.md has the cells that are run, no other ones, and says of each client how it is set up."""

from __future__ import annotations

import re
from pathlib import Path

from tests.e2e.clients.asked import EVERY
from tests.e2e.clients.matrix import CLIENTS, written

PAGE = (Path(__file__).parents[3] / "docs" / "clients.md").read_text()


def test_the_table_has_every_cell_that_is_run_and_no_other() -> None:
    assert written(PAGE) == PAGE, "python -m tests.e2e.clients.matrix --write docs/clients.md"


def test_what_clients_can_do_has_a_name_in_the_table() -> None:
    assert all(client.cells <= set(EVERY) for client in CLIENTS)
    assert set().union(*(client.cells for client in CLIENTS)) == set(EVERY), "a row without a cell"


def test_each_client_is_set_up_somewhere_on_the_page() -> None:
    headings = " ".join(re.findall(r"^### (.*)$", PAGE, re.MULTILINE))
    assert not [client.name for client in CLIENTS if client.name not in headings]
