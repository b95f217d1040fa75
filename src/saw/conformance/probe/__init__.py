"""The program that runs inside the sandbox: Python 3.9 or later, standard library only, sent on standard input.

Its parts are ordinary modules here; :func:`saw.conformance.transfer.script` joins them into one program. They import nothing of
this distribution but each other.
"""
