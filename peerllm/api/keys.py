"""What the application carries for its handlers, by typed keys."""

from __future__ import annotations

from aiohttp import web

from peerllm.api.askers.accounts import Accounts
from peerllm.api.core.kept.answer_store import AnswerStore
from peerllm.api.expected_model import ExpectedModel
from peerllm.api.guard import Guard
from peerllm.api.tasks import Tasks
from peerllm.api.text.text_store import TextStore
from peerllm.daemon.facade import Household

HOUSEHOLD: web.AppKey[Household] = web.AppKey("household", Household)
TEXTS: web.AppKey[TextStore] = web.AppKey("texts", TextStore)
TASKS: web.AppKey[Tasks] = web.AppKey("tasks", Tasks)
EXPECTED: web.AppKey[ExpectedModel] = web.AppKey("expected", ExpectedModel)
ANSWERS: web.AppKey[AnswerStore] = web.AppKey("answers", AnswerStore)
ACCOUNTS: web.AppKey[Accounts] = web.AppKey("accounts", Accounts)
GUARD: web.AppKey[Guard] = web.AppKey("guard", Guard)
