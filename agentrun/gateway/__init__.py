"""HTTP for sessions: any client, unmodified `useChat`, Durable Streams, and a web page.

::

    gateway = Gateway("nats://localhost:4222", auth=Auth(Keys.secret(secret)), agent="support")

is an ASGI application; ``agentrun gateway`` runs one. Needs the extra ``gateway``.
"""

from agentrun.gateway.app import Gateway
from agentrun.gateway.auth import Auth
from agentrun.gateway.keys import Keys, mint
from agentrun.gateway.problems import Problem
from agentrun.gateway.rights import Principal
from agentrun.settings import GatewaySettings

__all__ = ["Auth", "Gateway", "GatewaySettings", "Keys", "Principal", "Problem", "mint"]
