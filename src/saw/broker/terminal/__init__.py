"""Terminals in a browser: a ticket for the connection, and a real OpenSSH client behind it that goes through the bastion."""
