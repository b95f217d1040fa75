"""Secrets of a service at rest, behind one interface: files, files sealed under a key of systemd, Vault or OpenBao."""
