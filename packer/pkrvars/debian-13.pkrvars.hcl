# What depends on the base operating system of an image: Debian 13 (trixie). The build reads this file before Packer does, for the
# base tree (saw.image.base_os), and then hands it to Packer. Only lines of the form name = "text" and comments.
suite              = "trixie"
keyring            = "/usr/share/keyrings/debian-archive-keyring.gpg"
packages           = "packages/workspace.txt"
python_interpreter = "/usr/bin/python3"
