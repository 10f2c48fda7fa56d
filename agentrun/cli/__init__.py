"""The command line, ``agentrun``.

A command's module is imported when that command is used, so that the others do not pay for it.
"""

from __future__ import annotations

from importlib import import_module

import click

from agentrun.cli.common import connection_options

__all__ = ["main"]

_COMMANDS = {
    "dev": ("agentrun.cli.dev:dev", "Run a broker and workers here, for development."),
    "setup": ("agentrun.cli.admin:setup", "Create or update what the namespace needs at the broker."),
    "gateway": ("agentrun.cli.gateway:gateway", "Serve sessions over HTTP."),
    "token": ("agentrun.cli.token:token", "Make, show and revoke tokens for the gateway."),
    "worker": ("agentrun.cli.worker:worker", "Run agents."),
    "send": ("agentrun.cli.talk:send", "Send a turn and print the answer as it streams."),
    "chat": ("agentrun.cli.chat:chat", "Talk to an agent in the terminal."),
    "tail": ("agentrun.cli.read:tail", "Print a session's events, from any offset, and follow them."),
    "history": ("agentrun.cli.read:history", "Print a session's conversation."),
    "cancel": ("agentrun.cli.talk:cancel", "Stop a turn, or all of a session, and print the receipt."),
    "answer": ("agentrun.cli.talk:answer", "Answer a question that a turn asked."),
    "delete": ("agentrun.cli.read:delete", "Remove a session with all its records."),
    "export": ("agentrun.cli.moving:export", "Write sessions to stdout, to import them at another broker."),
    "import": ("agentrun.cli.moving:import_", "Store the sessions that `export` wrote."),
    "sessions": ("agentrun.cli.admin:sessions", "List the sessions, newest first."),
    "status": ("agentrun.cli.admin:status", "Show queues, workers and running turns."),
    "top": ("agentrun.cli.top:top", "Watch the fleet live, and stop a turn with a key."),
    "dead": ("agentrun.cli.dead:dead", "List turns that gave up; send them again, or drop them."),
    "demo": ("agentrun.cli.demo:demo", "Watch a fleet survive what breaks others."),
    "bench": ("agentrun.cli.bench:bench", "Measure this machine and broker."),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="agentrun", prog_name="agentrun")
@connection_options(defaults=True)
def main() -> None:
    """Fleets of agent workers on a broker.

    Every option can be given in the environment as well: --lease is AGENTRUN_LEASE.
    """
