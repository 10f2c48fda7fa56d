"""agentrun: a framework for fleets of agent workers on a broker."""
