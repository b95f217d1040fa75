"""Endpoint detection: a watcher, a malware scanner and file integrity behind one interface, and vendor agents beside them."""
