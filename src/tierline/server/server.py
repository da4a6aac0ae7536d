"""Everything that a request may need, held together; and what an operator chose.

`serve` builds one, `app` hangs it on the application, endpoints find it there.
"""

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request

from tierline.engine.async_engine import AsyncEngine
from tierline.engine.grammar import Grammars
from tierline.server.browser import is_loopback
from tierline.server.keys import Keys
from tierline.server.recorder import Recorder
from tierline.server.running import Running
from tierline.server.service import Service
from tierline.server.state import State
from tierline.server.tools import ToolFormat

WATCH_COOKIE = "tierline-watch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an operator may choose, with what most want."""

    model_names: tuple[str, ...]  # the first is the one that answers carry
    host: str = "127.0.0.1"
    body_bytes_max: int = 8_000_000
    body_s: float = 30.0  # within which a body has to come
    input_tokens_max: int | None = None  # 413 above; None: as the model's positions allow
    output_tokens_default: int | None = None  # of a chat that does not say; None: no end
    open_max: int = 1024  # requests here at once, waiting ones included; 429 above
    stalled_s: float = 30.0  # a reader that takes nothing for so long loses its stream
    admin_token: str = ""  # "": nobody may administer


@dataclass(slots=True, kw_only=True)
class Server:
    """The parts of one running server."""

    settings: Settings
    running: Running
    engine: AsyncEngine
    service: Service
    recorder: Recorder
    state: State
    keys: Keys
    grammars: Grammars | None  # None: the model has no tokenizer, prompts come as tokens
    tools: ToolFormat | None  # likewise, or it has no chat template
    started_s: float  # Unix time
    clock_s: Callable[[], float]  # likewise, now
    new_id: Callable[[], str]  # 24 characters that no other request has
    compiling: asyncio.Lock = field(default_factory=asyncio.Lock)  # one grammar at a time

    @property
    def model(self) -> str:
        """The name that answers carry."""
        return self.settings.model_names[0]

    @property
    def watch_cookie(self) -> str:
        """What a browser holds once somebody has shown it the admin token."""
        return hmac.digest(self.settings.admin_token.encode(), b"watch", "sha256").hex()

    def may_watch(self, request: Request) -> bool:
        """Whether pages show to who asks: to everybody on this machine while no key is needed."""
        if is_loopback(self.settings.host) and not self.keys.required:
            return True
        return self.settings.admin_token != "" and hmac.compare_digest(
            request.cookies.get(WATCH_COOKIE, "").encode(), self.watch_cookie.encode()
        )

    @property
    def not_ready(self) -> str:
        """Why nobody should send requests here now; "" when they should."""
        if self.service.draining:
            return "draining"
        return self.engine.failed or self.state.trouble
