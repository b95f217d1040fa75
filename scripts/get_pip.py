"""Stand-in for get-pip.py: takes pip from the interpreter itself (ensurepip) instead of downloading it.

ansible-test runs this file in each environment that it makes for a sanity test, with requirement names and options of pip
as arguments. Other packages named there (setuptools, wheel) come from the configured package index.
"""

import ensurepip
import subprocess
import sys

ensurepip.bootstrap()
options = [word for word in sys.argv[1:] if word not in {"--no-setuptools", "--no-wheel"}]
packages = [word for word in options if not word.startswith("-") and not word.startswith("pip==")]
if packages:
    flags = [word for word in options if word.startswith("-")]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, *packages], check=True)
