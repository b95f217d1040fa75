"""Package saw.lab (see docs/architecture.md)."""
