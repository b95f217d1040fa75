"""People in the browser: single sign-on, sessions, passkeys, and the pages on which reviews are decided."""
