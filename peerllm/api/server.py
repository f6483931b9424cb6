"""The application and the listening socket: everything HTTP that the daemon offers to people and programs."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Iterable
from functools import partial
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from peerllm.api.admin import add_admin
from peerllm.api.anthropic.anthropic_answers import anthropic_error
from peerllm.api.anthropic.anthropic_models import VERSION_HEADER
from peerllm.api.anthropic.anthropic_routes import MESSAGES_PATH, add_anthropic
from peerllm.api.askers.accounts import Accounts
from peerllm.api.askers.person_tokens import TOKENS_FILE, PersonTokens
from peerllm.api.askers.request_log import add_request_id, with_request_id
from peerllm.api.askers.token_routes import add_tokens
from peerllm.api.bodies import MAX_BODY_BYTES
from peerllm.api.core.kept import inherited_answers
from peerllm.api.core.kept.answer_store import AnswerStore
from peerllm.api.error_answers import SHAPES, errors_as_json
from peerllm.api.expected_model import ExpectedModel
from peerllm.api.guard import Guard, add_security_headers, guarded, is_loopback
from peerllm.api.keys import ACCOUNTS, ANSWERS, EXPECTED, GUARD, HOUSEHOLD, TASKS, TEXTS
from peerllm.api.ollama.ollama_answers import ollama_error
from peerllm.api.ollama.ollama_routes import add_ollama
from peerllm.api.openai.openai_routes import add_openai
from peerllm.api.openai.responses.response_answers import responses_error
from peerllm.api.openai.responses.response_routes import RESPONSES_PATH
from peerllm.api.owner_routes import add_owner
from peerllm.api.page import add_page
from peerllm.api.peer_api import PeerApi
from peerllm.api.routes.api_document import openapi_document
from peerllm.api.routes.api_route import ROUTES, ApiRoute, add_routes
from peerllm.api.tasks import Tasks
from peerllm.api.text.text_store import TextStore
from peerllm.api.token import load_or_create_token
from peerllm.daemon.facade import Household
from peerllm.errors import BadInputError, UnavailableError
from peerllm.transport.listening.http_acceptor import HttpAcceptor
from peerllm.transport.listening.waiting_connections import most_waiting

BACKLOG = 512  # connections waiting to be accepted
CLIENTS_TIMES = 4  # as many connections may wait as at other ports: clients come by the hundred in one instant
SHUTDOWN_S = 2.0  # seconds that answers under way have when the API closes
IDLE_S = 75.0  # seconds a connection may stay open without a request
START_WAIT_S = 60.0  # seconds a request waits for the device to start
WHILE_STARTING = ("/peerllm/v1/status", "/peerllm/v1/events", "/peerllm/v1/process", "/static/")  # and the page
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  where this machine reaches itself


def create_app(
    household: Household,
    token: str,
    loopback: bool,
    names: Iterable[str] = (),
    expected: str = "",
    in_process: bool = False,
    persons: PersonTokens | None = None,
) -> web.Application:
    """Every route over the household's face, behind the guard; `names`: further hosts the owner calls it by.

    `expected`: the model that is about to be run, "" if none is; `in_process`: child processes are not welcome.
    """
    guard = Guard(token, loopback, frozenset(name.lower() for name in names), persons or PersonTokens())
    middlewares = with_request_id, guarded(guard), errors_as_json, when_started
    app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
    app[HOUSEHOLD] = household
    app[GUARD] = guard
    by_anthropic = dict.fromkeys((MESSAGES_PATH, VERSION_HEADER), anthropic_error)
    app[SHAPES] = {"/api/": ollama_error, RESPONSES_PATH: responses_error, **by_anthropic}
    app[EXPECTED] = ExpectedModel(expected)
    app.on_response_prepare.append(add_security_headers)
    app.on_response_prepare.append(add_request_id)
    app[TEXTS] = TextStore(in_process)
    app[TASKS] = Tasks()
    app[ANSWERS] = AnswerStore()
    app[ACCOUNTS] = Accounts()
    app[ROUTES] = []
    app.cleanup_ctx.append(_resources)
    app.on_shutdown.append(_end_streams)
    add_page(app)
    add_openai(app)
    add_ollama(app)
    add_anthropic(app)
    add_tokens(app)
    add_admin(app)
    add_owner(app)
    add_routes(app, ApiRoute("GET", "/openapi.json", openapi_document))
    return app


@web.middleware
async def when_started(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Who asks while the device starts waits for it, but for what shows that it does."""
    if request.path != "/" and not request.path.startswith(WHILE_STARTING):
        with request.app[TASKS].stream(request.remote or ""):
            try:
                async with asyncio.timeout(START_WAIT_S):
                    await request.app[HOUSEHOLD].started()
            except TimeoutError:
                raise UnavailableError("this device is still starting; ask again in a moment") from None
    return await handler(request)


async def _resources(app: web.Application) -> AsyncIterator[None]:
    yield
    await app[TASKS].close()
    await app[ANSWERS].close()
    await app[TEXTS].close()


async def _end_streams(app: web.Application) -> None:
    await app[TASKS].close()
    await app[ANSWERS].close()


class ApiServer:
    """Listens on host:port. `reserve` takes the port before anything else is started, `start` begins to answer."""

    def __init__(
        self,
        household: Household,
        host: str,
        port: int,
        data_dir: Path,
        names: Iterable[str] = (),
        expected: str = "",
        in_process: bool = False,
    ) -> None:
        self.host = host
        self.port = port
        self._names = (host, *names)
        self._expected, self._in_process = expected, in_process
        self._household = household
        self._data_dir = data_dir
        self._socket: socket.socket | None = None
        self._runner: web.AppRunner | None = None
        self._acceptor = HttpAcceptor(most=most_waiting(CLIENTS_TIMES))

    async def reserve(self) -> None:
        """BadInputError if this address cannot be had."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            family, _, _, _, address = found[0]
            self._socket = socket.create_server(address, family=family, backlog=BACKLOG)
        except OSError as error:
            raise BadInputError(self._why(error)) from error
        self.port = int(self._socket.getsockname()[1])

    async def start(self) -> None:
        """Serves the API and the page; reserves first where that was not done."""
        if self._socket is None:
            await self.reserve()
        assert self._socket is not None
        token, persons = load_or_create_token(self._data_dir), PersonTokens(self._data_dir / TOKENS_FILE)
        loopback = is_loopback(self.host)
        app = create_app(self._household, token, loopback, self._names, self._expected, self._in_process, persons)
        app.middlewares.insert(0, self._acceptor.bounded)
        runner = self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S, keepalive_timeout=IDLE_S
        )
        await runner.setup()
        self._household.answer_peers(PeerApi(app))
        self._household.inherit_answers(partial(inherited_answers.go_on, app))
        self._acceptor.start(runner, (self._socket,))

    def _why(self, error: OSError) -> str:
        where = f"{self.host}:{self.port}"
        if error.errno == errno.EADDRINUSE:
            return f"port {self.port} on {self.host} is in use; choose another with --api HOST:PORT"
        return f"cannot listen on {where} ({error.strerror or error}); choose another address with --api HOST:PORT"

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = _EVERYWHERE.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    async def close(self) -> None:
        """Ends what is under way and stops listening; may be called twice."""
        runner, self._runner = self._runner, None
        await self._acceptor.close()
        if runner is not None:
            await runner.cleanup()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
