"""Security updates: what is pending, what is held and why, when to restart, and what of it is a finding."""
