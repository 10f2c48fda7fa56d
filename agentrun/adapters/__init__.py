"""Agents of other frameworks, and model libraries, as what an agent yields: one module each, no base class."""
