"""Package saw.broker (see docs/architecture.md)."""
