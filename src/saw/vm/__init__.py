"""Package saw.vm (see docs/architecture.md)."""
