"""Package saw.runtime (see docs/architecture.md)."""
