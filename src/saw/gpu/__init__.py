"""GPUs of a workspace: the driver in its image, the look whether it works, and the wipe when the user changes."""
