"""Sessions of people with workspaces: what bastion and broker say of them, their recordings, and the bastion's recorder."""
