"""Package saw.identity (see docs/architecture.md)."""
