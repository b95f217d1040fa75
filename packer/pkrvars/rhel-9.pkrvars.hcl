# What depends on the base operating system of an image: the family of RHEL 9. Read by tests, never built: the build refuses it, since
# it makes base trees of Debian's packages. docs/images.md says what differs and which roles work on a host of it.
suite              = "9"
keyring            = "/etc/pki/rpm-gpg/RPM-GPG-KEY-redhat-release"
packages           = "packages/workspace-rhel.txt"
python_interpreter = "/usr/bin/python3"
family             = "redhat"
archive            = "BaseOS"
components         = "BaseOS AppStream"
runtime_python     = "3.12"
