"""Agents to deploy as they are: ``agentrun worker workers.echo:echo``."""
