"""Review: a consequential write waits, as exact bytes, until people have decided on it; then it runs at most once."""
