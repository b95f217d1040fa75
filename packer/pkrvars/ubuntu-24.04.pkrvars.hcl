# What depends on the base operating system of an image: Ubuntu 24.04 (noble). Read by tests, never built: docs/images.md says what
# differs. The machine that builds needs an Ubuntu mirror in its apt configuration and the package ubuntu-archive-keyring.
suite              = "noble"
keyring            = "/usr/share/keyrings/ubuntu-archive-keyring.gpg"
packages           = "packages/workspace-ubuntu.txt"
python_interpreter = "/usr/bin/python3"
archive            = "Ubuntu"
components         = "main universe"
runtime_python     = "3.12"
