"""Secure Agent Workspace: governed places for autonomous agents."""

__version__ = "0.1.0"
