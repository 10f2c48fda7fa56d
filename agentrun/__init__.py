"""agentrun: a framework for fleets of agent workers on a broker."""

from agentrun import blocking
from agentrun.agent import Agent, Context, agent
from agentrun.client import Client, DeadTurn, Event, Receipt, Result, Session, Steer, Turn, connect
from agentrun.errors import (
    AgentrunError,
    BrokerError,
    Conflict,
    Duplicate,
    Fail,
    IdTaken,
    InvalidInput,
    Misconfigured,
    NotWaiting,
    QueueFull,
    RecordsLost,
    Retry,
    SessionBusy,
    SessionError,
    SessionGone,
    TooLarge,
    TurnFailed,
    TurnNotFound,
    Unavailable,
)
from agentrun.history import History
from agentrun.settings import ClientSettings, WorkerSettings
from agentrun.wire import Message, Usage
from agentrun.worker import Worker

__all__ = [
    "Agent",
    "AgentrunError",
    "BrokerError",
    "Client",
    "ClientSettings",
    "Conflict",
    "Context",
    "DeadTurn",
    "Duplicate",
    "Event",
    "Fail",
    "History",
    "IdTaken",
    "InvalidInput",
    "Message",
    "Misconfigured",
    "NotWaiting",
    "QueueFull",
    "Receipt",
    "RecordsLost",
    "Result",
    "Retry",
    "Session",
    "SessionBusy",
    "SessionError",
    "SessionGone",
    "Steer",
    "TooLarge",
    "Turn",
    "TurnFailed",
    "TurnNotFound",
    "Unavailable",
    "Usage",
    "Worker",
    "WorkerSettings",
    "agent",
    "blocking",
    "connect",
]
