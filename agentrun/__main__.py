"""``python -m agentrun``."""

from agentrun.cli import main

main(prog_name="agentrun")
